"""Axolotl: a YAML file."""

from __future__ import annotations

from qinit.trainers.templates.base import Template, TemplateWriter, only_lora
from qinit.trainers.training import Training
from qinit.trainers.yaml_text import scalar

TEMPLATE = """\
# {head}
# {origin}
#
#     axolotl train FILE
#
base_model: {base}
adapter: {adapter}
load_in_4bit: {nf4}
lora_r: {rank}
lora_alpha: {alpha}
lora_dropout: {dropout}
lora_target_modules:
{targets}
{options}
datasets:
  - path: {data}  # a row is {{"text": ...}}
{json}    split: train
    type: completion
sequence_len: 1024

output_dir: {output}
seed: 42
num_epochs: 1
learning_rate: {rate}
lr_scheduler: cosine
warmup_ratio: 0.03
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
NAMES = {"use_rslora": "peft_use_rslora", "use_dora": "peft_use_dora"}  # Axolotl's


class AxolotlTemplate(TemplateWriter):
    name = "axolotl"
    suffix = ".yaml"
    command = "axolotl train {file}"
    seen = "by the source of axolotl 0.19.0"
    distribution = "axolotl"

    def cannot_write(self, template: Template, training: Training) -> str | None:
        return only_lora(template, self.name)

    def write(self, template: Template, training: Training) -> str:
        options = [f"{name}: true\n" for key, name in NAMES.items() if template.settings.get(key)]
        options += [f"peft_init_lora_weights: {scalar(template.start)}\n"] if template.start is not None else []
        return TEMPLATE.format(
            **self.head(template),
            base=scalar(template.base),
            adapter="qlora" if template.is_nf4 else "lora",
            nf4="true" if template.is_nf4 else "false",
            rank=template.number("r", 8),
            alpha=template.number("lora_alpha", 8),
            dropout=template.number("lora_dropout", 0.0),
            targets="\n".join(f"  - {scalar(name)}" for name in template.targets),
            options="".join(options),
            data=scalar(training.name),
            json="" if training.file is None else "    ds_type: json\n",
            output=scalar(self.output(template)),
            rate=training.yaml_rate,
            bf16="auto" if training.bf16 else "false",
        )
