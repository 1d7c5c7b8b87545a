"""Axolotl: a YAML file."""

from __future__ import annotations

from qinit.trainers.base import TrainableRun, Trainer
from qinit.trainers.training import Training
from qinit.trainers.yaml_text import scalar

TEMPLATE = """\
# {head}
# {origin}
#
#     axolotl train FILE
#
# lora_model_dir is what keeps the start. Axolotl asks for lora_r, lora_alpha and the targets too, and then uses those
# of the adapter. The LoRA kernels are for a GPU, and for weights that are not packed. load_in_8bit and
# load_in_4bit would quantize the base anew.
base_model: {base}
adapter: lora
lora_model_dir: {start}
lora_r: {rank}
lora_alpha: {alpha}
lora_target_linear: true
lora_qkv_kernel: false
lora_o_kernel: false
lora_mlp_kernel: false
load_in_8bit: false
load_in_4bit: false
{options}
datasets:
  - path: {data}  # a row is {{"text": ...}}
{json}    type: completion
sequence_len: 1024

output_dir: {output}
num_epochs: 1
learning_rate: {rate}
lr_scheduler: cosine
optimizer: adamw_torch
micro_batch_size: 1
gradient_accumulation_steps: 16
bf16: {bf16}  # auto on a GPU; false on a CPU, where auto would be fp16
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
logging_steps: 10
save_steps: 100
"""


class AxolotlTrainer(Trainer):
    name = "axolotl"
    title = "Axolotl"
    suffix = ".yaml"
    command = "axolotl train {file}"
    seen = "run with axolotl 0.19.0, transformers 5.16.1 and peft 0.20.0"
    distribution = "axolotl"
    install = ("pip install axolotl==0.19.0",)
    packed_install = (
        "pip install --no-deps gptqmodel==7.6.0 optimum==2.3.0",
        "pip install --no-deps pypcre==0.6.4 logbar==0.4.15 tokenicer==0.0.14 device-smi==0.5.7 defuser==0.0.28",
    )

    def config(self, run: TrainableRun, training: Training) -> str:
        options = ["gptq: true"] if run.packed else []
        options += ["trust_remote_code: true"] if run.own_code else []
        return TEMPLATE.format(
            **self.head(run),
            base=scalar(run.base),
            start=scalar(run.start),
            rank=run.adapter["r"],
            alpha=run.adapter["lora_alpha"],
            options="".join(f"{line}\n" for line in options),
            data=scalar(training.name),
            json="    split: train\n" if training.file is None else "    ds_type: json\n",
            rate=training.yaml_rate,
            bf16="auto" if training.bf16 else "false",
            output=scalar(self.output(run)),
        )
