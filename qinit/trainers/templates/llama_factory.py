"""LLaMA-Factory: a YAML file."""

from __future__ import annotations

from typing import Any

from qinit.trainers.llama_factory import note_on
from qinit.trainers.templates.base import Template, TemplateWriter, only_lora
from qinit.trainers.training import Training
from qinit.trainers.yaml_text import scalar

TEMPLATE = """\
# {head}
# {origin}
#
#     llamafactory-cli train FILE
#
{note}model_name_or_path: {base}
stage: sft
do_train: true
finetuning_type: lora
lora_rank: {rank}
lora_alpha: {alpha}
lora_dropout: {dropout}
lora_target: {targets}
{options}
dataset: {dataset}
dataset_dir: {folder}
template: default  # your model's, of LLaMA-Factory's list
cutoff_len: 1024

output_dir: {output}
seed: 42
num_train_epochs: 1.0
learning_rate: {rate}
lr_scheduler_type: cosine
warmup_ratio: 0.03
per_device_train_batch_size: 1
gradient_accumulation_steps: 16
use_reentrant_gc: false
bf16: {bf16}  # true on a GPU; false on a CPU, where TrainingArguments refuses it
logging_steps: 10
save_steps: 100
report_to: none
"""


class LlamaFactoryTemplate(TemplateWriter):
    name = "llama-factory"
    suffix = ".yaml"
    command = "llamafactory-cli train {file}"
    seen = "by the source of llamafactory 0.9.5"
    distribution = "llamafactory"

    def cannot_write(self, template: Template, training: Training) -> str | None:
        if problem := only_lora(template, self.name):
            return problem
        if template.start is not None and template.method != "pissa":
            return f"starts LoRA and PiSSA, and not {template.start}; --trainer peft takes it"
        return None

    def write(self, template: Template, training: Training) -> str:
        options: dict[str, Any] = {key: "true" for key in ("use_rslora", "use_dora") if template.settings.get(key)}
        if template.start is not None:
            options |= {"pissa_init": "true", "pissa_iter": template.start.rpartition("niter_")[2]}
            options["pissa_iter"] = options["pissa_iter"] if options["pissa_iter"].isdecimal() else -1
        if template.is_nf4:
            options |= {"quantization_bit": 4, "quantization_method": "bnb", "quantization_type": "nf4"}
            options["double_quantization"] = "true"
        file = training.file
        return TEMPLATE.format(
            **self.head(template),
            note=note_on(training),
            base=scalar(template.base),
            rank=template.number("r", 8),
            alpha=template.number("lora_alpha", 8),
            dropout=template.number("lora_dropout", 0.0),
            targets=scalar(",".join(template.targets)),
            options="".join(f"{key}: {value}\n" for key, value in options.items()),
            dataset=scalar(training.name if file is None else file.stem),
            folder="ONLINE" if file is None else scalar(str(file.parent)),
            output=scalar(self.output(template)),
            rate=training.yaml_rate,
            bf16="true" if training.bf16 else "false",
        )
