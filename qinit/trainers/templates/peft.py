"""PEFT with transformers' Trainer, for every kind of adapter: a script."""

from __future__ import annotations

import json
from typing import Any

from qinit.families import FAMILIES, family_named
from qinit.recipe_files import BESIDE
from qinit.trainers.templates.base import Template, TemplateWriter
from qinit.trainers.training import Training

TEMPLATE = """\
# {head}
# {origin}
#
#     python FILE

import torch
from datasets import load_dataset
from peft import {imported}
from transformers import ({names}
)

tokenizer = AutoTokenizer.from_pretrained({base})
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = {rows}  # a row is {{"text": ...}}
rows = rows.map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=1024),
    batched=True,
    remove_columns=rows.column_names,
)

base = AutoModelForCausalLM.from_pretrained(
    {base},
    dtype=torch.bfloat16,{quantized}
)
base.config.use_cache = False
torch.manual_seed(42)
{model}
model.print_trainable_parameters()
{before}
trainer = Trainer(
    model=model,
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),{callbacks}
    args=TrainingArguments(
        output_dir={output},
        seed=42,
        num_train_epochs=1,
        learning_rate={rate},
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # below 1 it is a share
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing={checkpointing},
        gradient_checkpointing_kwargs={{"use_reentrant": False}},
        logging_steps=10,
        save_steps=100,
        report_to="none",
    ),
)
trainer.train()
trainer.save_model()
"""
ADALORA = '''

class Budget(TrainerCallback):
    """Gives AdaLoRA its ranks after every step, while the gradients are there."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        model.base_model.update_and_allocate(state.global_step)

'''
STARTED = """\
model = get_peft_model(
    base,
    {config}(
{settings}
    ),
)"""
NAMES = ("AutoModelForCausalLM", "AutoTokenizer", "DataCollatorForLanguageModeling", "Trainer", "TrainingArguments")


class PeftTemplate(TemplateWriter):
    name = "transformers"
    suffix = ".py"
    command = "python {file}"
    seen = "run with transformers 5.23.0 and peft 0.21.2"
    distribution = "peft"

    def cannot_write(self, template: Template, training: Training) -> str | None:
        kind = template.settings["peft_type"]
        if not template.is_lora and family_named(template.settings) is None:
            return f"{template.name} is {kind}; written are LORA and {', '.join(sorted(FAMILIES))}"
        if template.settings.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
            return f"writes a script for causal language models, and {template.name} is for another task"
        return None

    def write(self, template: Template, training: Training) -> str:
        family = family_named(template.settings)
        adalora = family == "adalora"
        values: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        values |= {
            key: value for key, value in template.settings.items() if key not in BESIDE | {"quantization_config"}
        }
        names = [
            *NAMES,
            *(["TrainerCallback"] if adalora else []),
            *(["BitsAndBytesConfig"] if template.is_nf4 else []),
        ]
        config = "LoraConfig" if family is None else FAMILIES[family].config
        settings = "\n".join(f"        {key}={_python(value)}," for key, value in values.items())
        imported, model = f"{config}, get_peft_model", STARTED.format(config=config, settings=settings)
        if template.adapter is not None:
            place = json.dumps(str(template.adapter), ensure_ascii=False)
            imported, model = "PeftModel", f"model = PeftModel.from_pretrained(base, {place}, is_trainable=True)"
        return TEMPLATE.format(
            **self.head(template),
            imported=imported,
            model=model,
            names="".join(f"\n    {name}," for name in sorted(names)),
            base=json.dumps(template.base, ensure_ascii=False),
            rows=training.rows,
            quantized=_quantized(template),
            before=ADALORA if adalora else "",
            callbacks="\n    callbacks=[Budget()]," if adalora else "",
            output=json.dumps(self.output(template), ensure_ascii=False),
            rate=training.python_rate,
            checkpointing=family != "prefix-tuning",  # whose keys and values checkpointing would drop
        )


def _quantized(template: Template) -> str:
    if not template.is_nf4:
        return ""
    nested = bool(template.settings["quantization_config"].get("bnb_4bit_use_double_quant"))
    return f"""
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant={nested},
    ),"""


def _python(value: Any) -> str:
    """Return a value of JSON as Python, with the quotes that are usual there."""
    words = value if isinstance(value, list) else [value]
    return json.dumps(value) if all(isinstance(word, str) for word in words) else repr(value)
