"""TRL's sft script with its flags: a shell script."""

from __future__ import annotations

import shlex

from qinit.trainers.templates.base import Template, TemplateWriter, only_lora
from qinit.trainers.training import Training

TEMPLATE = """\
#!/bin/sh
# {head}
# {origin}
#
#     sh FILE
#
# A row of the data is {{"text": ...}}, or a chat. bf16 is for accelerators: TrainingArguments refuses True on a CPU.
bf16=$(python -c 'from transformers.utils import is_torch_bf16_gpu_available as has; print(has())')
trl sft \\
{flags}
"""


class TrlTemplate(TemplateWriter):
    name = "trl"
    suffix = ".sh"
    command = "sh {file}"
    seen = "its flags by the parser of trl 1.16.0"
    distribution = "trl"

    def cannot_write(self, template: Template, training: Training) -> str | None:
        if problem := only_lora(template, self.name):
            return problem
        if template.start is not None:
            return (
                f"its sft script starts LoRA and DoRA as PEFT does, and not as {template.start}; write the start with "
                "`qinit adapter` and give its directory, or take --trainer peft"
            )
        if training.file is not None:
            return "its sft script reads data sets by their names, and no file; --trainer peft takes one"
        return None

    def write(self, template: Template, training: Training) -> str:
        flags = [
            f"--model_name_or_path {shlex.quote(template.base)}",
            "--dtype bfloat16",
            f"--dataset_name {shlex.quote(training.name)}",
            f"--output_dir {shlex.quote(self.output(template))}",
            "--seed 42",
            "--num_train_epochs 1",
            f"--learning_rate {training.python_rate}",
            "--lr_scheduler_type cosine",
            "--warmup_steps 0.03",  # below 1 it is a share
            "--per_device_train_batch_size 1",
            "--gradient_accumulation_steps 16",
            "--gradient_checkpointing True",
            """--gradient_checkpointing_kwargs '{"use_reentrant": false}'""",
            "--max_length 1024",
            '--bf16 "$bf16"',
            "--logging_steps 10",
            "--save_steps 100",
            "--report_to none",
            "--use_peft True",
            f"--lora_r {template.number('r', 8)}",
            f"--lora_alpha {template.number('lora_alpha', 8)}",
            f"--lora_dropout {template.number('lora_dropout', 0.0)}",
            f"--lora_target_modules {' '.join(map(shlex.quote, template.targets))}",
            f"--lora_task_type {template.settings.get('task_type') or 'CAUSAL_LM'}",
            *(f"--{flag} True" for flag in ("use_rslora", "use_dora") if template.settings.get(flag)),
        ]
        if template.is_nf4:
            flags += ["--load_in_4bit True", "--bnb_4bit_quant_type nf4", "--use_bnb_nested_quant True"]
        return TEMPLATE.format(**self.head(template), flags=" \\\n".join(f"  {flag}" for flag in flags))
