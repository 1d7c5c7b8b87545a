"""LLaMA-Factory: a YAML file."""

from __future__ import annotations

import json
import shlex

from qinit.trainers.base import TrainableRun, Trainer
from qinit.trainers.training import Training
from qinit.trainers.yaml_text import scalar

TEMPLATE = """\
# {head}
# {origin}
#
#     llamafactory-cli train FILE
#
{note}# lora_rank, lora_alpha, lora_target and lora_dropout would be ignored: the adapter brings its own. What loses the
# start: create_new_adapter, pissa_init. What quantizes the base anew: quantization_bit, use_unsloth.
model_name_or_path: {base}
adapter_name_or_path: {start}
{trusted}
stage: sft  # or pt
do_train: true
finetuning_type: lora
create_new_adapter: false

dataset: {dataset}
dataset_dir: {folder}
template: default  # your model's, of LLaMA-Factory's list
cutoff_len: 1024

output_dir: {output}
num_train_epochs: 1.0
learning_rate: {rate}
per_device_train_batch_size: 1
gradient_accumulation_steps: 16
bf16: {bf16}  # true on a GPU; false on a CPU, where TrainingArguments refuses it
logging_steps: 10
save_steps: 100
report_to: none

# Afterwards{merge}
"""
NOTE = """\
# {folder} must hold a dataset_info.json with an entry for {file}. For sft, with rows
# {{"instruction": ..., "output": ...}}, and for pt, with rows {{"text": ...}}:
#     {{{name}: {{"file_name": {file}, "columns": {{"prompt": "instruction", "response": "output"}}}}}}
#     {{{name}: {{"file_name": {file}, "columns": {{"prompt": "text"}}}}}}
#
"""
ONLINE = "# The data set's columns are instruction, input and output, or say others in a dataset_info.json.\n#\n"
MERGE = """, base and adapter as one model of 16 bits:
#     llamafactory-cli export --model_name_or_path {base} \\
#       --adapter_name_or_path {output} --template default --export_dir {output}-merged"""
NO_MERGE = """: PEFT does not merge an adapter into a packed base, and so `llamafactory-cli export` does not either.
# `qinit.exports.write.export` writes base and adapter dense."""


class LlamaFactoryTrainer(Trainer):
    name = "llama-factory"
    title = "LLaMA-Factory"
    suffix = ".yaml"
    command = "llamafactory-cli train {file}"
    seen = "run with llamafactory 0.9.5, transformers 5.6.0 and peft 0.18.1"
    distribution = "llamafactory"
    install = ("pip install llamafactory==0.9.5",)
    packed_install = (
        "pip install --no-deps gptqmodel==7.0.0 torchao==0.16.0 optimum==2.3.0",
        "pip install --no-deps pypcre==0.6.4 logbar==0.4.15 tokenicer==0.0.14 device-smi==0.5.7 defuser==0.0.28 "
        "threadpoolctl==3.8.0",
    )
    breaks = (("torchao>0.16", "peft 0.18 then loads no adapter, on a dense base either"),)

    def config(self, run: TrainableRun, training: Training) -> str:
        base, output = run.base, self.output(run)
        return TEMPLATE.format(
            **self.head(run),
            base=scalar(base),
            start=scalar(run.start),
            trusted="trust_remote_code: true\n" if run.own_code else "",
            note=note_on(training),
            folder="ONLINE" if training.file is None else scalar(str(training.file.parent)),
            dataset=scalar(training.name if training.file is None else training.file.stem),
            rate=training.yaml_rate,
            bf16="true" if training.bf16 else "false",
            output=scalar(output),
            merge=NO_MERGE if run.packed else MERGE.format(base=shlex.quote(base), output=shlex.quote(output)),
        )


def note_on(training: Training) -> str:
    """Return what LLaMA-Factory wants to know of a data set, as lines of a comment."""
    file = training.file
    if file is None:
        return ONLINE
    return NOTE.format(folder=scalar(str(file.parent)), name=json.dumps(file.stem), file=json.dumps(file.name))
