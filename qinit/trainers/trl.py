"""TRL's SFTTrainer: a script."""

from __future__ import annotations

from qinit.formats import FORMATS
from qinit.trainers.base import TrainableRun, Trainer
from qinit.trainers.training import Training

TEMPLATE = """\
# {head}
# {origin}
#
#     python FILE
#
# SFTTrainer gets base and adapter together, so that the start is kept. A peft_config here, one read from the run too,
# would put a new adapter on the base, whose start repairs nothing.

{imports}

rows = {rows}  # a row is {{"text": ...}}, or a chat

{loading}

trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained({base}{trusted}),
    train_dataset=rows,
    args=SFTConfig(
        output_dir={output},
        num_train_epochs=1,
        learning_rate={rate},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        bf16=torch.cuda.is_available(),
        max_length=1024,
        logging_steps=10,
        save_steps=100,
        report_to="none",
    ),
)
trainer.train(resume_from_checkpoint=False)  # True: from the last checkpoint in output_dir
trainer.save_model()
"""


class TrlTrainer(Trainer):
    name = "trl"
    title = "TRL's SFTTrainer"
    suffix = ".py"
    command = "python {file}"
    seen = "run with trl 1.16.0, transformers 5.23.0 and peft 0.21.2"
    distribution = "trl"
    install = ("pip install trl==1.16.0 transformers==5.23.0 peft==0.21.2 datasets==5.2.0",)
    packed_install = ("pip install gptqmodel==7.6.0 optimum==2.3.0",)

    def cannot_take(self, run: TrainableRun) -> str | None:
        loaded = run.packed_mixed or run.form not in FORMATS  # by the lines of the card
        return None if loaded and run.causal else super().cannot_take(run)

    def config(self, run: TrainableRun, training: Training) -> str:
        imports = [
            "import torch",
            "from datasets import load_dataset",
            "from transformers import AutoTokenizer",
            "from trl import SFTConfig, SFTTrainer",
        ]
        return TEMPLATE.format(**self.parts(run, training), **run.loading(imports))
