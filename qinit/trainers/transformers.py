"""transformers' own Trainer: a script."""

from __future__ import annotations

from qinit.trainers.base import TrainableRun, Trainer
from qinit.trainers.training import Training

# For the models whose loss needs nothing but text: how the collator makes labels of it.
COLLATORS = {"ForCausalLM": "mlm=False", "LMHeadModel": "mlm=False", "ForMaskedLM": "mlm=True"}

TEMPLATE = """\
# {head}
# {origin}
#
#     python FILE

{imports}

tokenizer = AutoTokenizer.from_pretrained({base}{trusted})
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = {rows}  # a row is {{"text": ...}}
rows = rows.map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=1024),
    batched=True,
    remove_columns=rows.column_names,
)

{loading}

trainer = Trainer(
    model=model,
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, {labels}),
    args=TrainingArguments(
        output_dir={output},
        num_train_epochs=1,
        learning_rate={rate},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=True,{checkpointing}
        gradient_checkpointing_kwargs={{"use_reentrant": False}},
        logging_steps=10,
        save_steps=100,
        report_to="none",
    ),
)
trainer.train(resume_from_checkpoint=False)  # True: from the last checkpoint in output_dir
trainer.save_model()
"""
# Without it the backward pass keeps what every packed layer was unpacked to.
CHECKPOINTING = "  # else every layer's unpacked weight is kept for the backward pass"


class TransformersTrainer(Trainer):
    name = "transformers"
    title = "transformers' Trainer"
    suffix = ".py"
    command = "python {file}"
    seen = "run with transformers 5.23.0 and peft 0.21.2, dense also with 4.57.6 and 0.18.1"
    distribution = "transformers"
    install = ("pip install transformers==5.23.0 peft==0.21.2 datasets==5.2.0",)
    packed_install = ("pip install gptqmodel==7.6.0 optimum==2.3.0",)

    def cannot_take(self, run: TrainableRun) -> str | None:
        if self._labels(run) is None:
            return (
                f"the loss of {run.class_name} needs more than text, so that the script depends on your data; load "
                "base and adapter with the lines in the run's README.md and give them to Trainer"
            )
        return None

    def config(self, run: TrainableRun, training: Training) -> str:
        imports = [
            "import torch",
            "from datasets import load_dataset",
            "from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments",
        ]
        return TEMPLATE.format(
            **self.parts(run, training),
            **run.loading(imports),
            labels=self._labels(run),
            checkpointing=CHECKPOINTING if run.packed else "",
        )

    @staticmethod
    def _labels(run: TrainableRun) -> str | None:
        return next((labels for end, labels in COLLATORS.items() if run.class_name.endswith(end)), None)
