"""Unsloth: a script, by its source."""

from __future__ import annotations

from qinit.trainers.base import TrainableRun, Trainer, quoted
from qinit.trainers.training import Training

TEMPLATE = """\
# {head}
# {origin}
#
#     python FILE
#
# load_in_4bit is True by default and would quantize the base anew; use_exact_model_name keeps Unsloth from loading
# another model in its place. No get_peft_model: the adapter is there. Unsloth computes on a GPU only.

from unsloth import FastLanguageModel  # before the others, which it changes

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

rows = {rows}  # a row is {{"text": ...}}, or a chat

# The adapter's directory: it names its base, and is loaded as trainable.
model, tokenizer = FastLanguageModel.from_pretrained(
    {start},
    max_seq_length=1024,
    load_in_4bit=False,
    use_exact_model_name=True,{trusted}
)

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=rows,
    args=SFTConfig(
        output_dir={output},
        num_train_epochs=1,
        learning_rate={rate},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        max_length=1024,
        logging_steps=10,
        save_steps=100,
        report_to="none",
    ),
)
trainer.train(resume_from_checkpoint=False)  # True: from the last checkpoint in output_dir
trainer.save_model()
"""


class UnslothTrainer(Trainer):
    name = "unsloth"
    title = "Unsloth"
    suffix = ".py"
    command = "python {file}"
    seen = "not run: by the source of unsloth 2026.8.19 (015bdef)"
    distribution = "unsloth"

    def cannot_take(self, run: TrainableRun) -> str | None:
        if run.packed:
            return (
                "computes with the weight of every layer (get_lora_parameters in unsloth/kernels/utils.py), which "
                "packed layers do not have; run qinit again with --format dense"
            )
        return super().cannot_take(run)

    def config(self, run: TrainableRun, training: Training) -> str:
        return TEMPLATE.format(
            **self.parts(run, training),
            start=quoted(run.start),
            trusted="\n    trust_remote_code=True," if run.own_code else "",
        )
