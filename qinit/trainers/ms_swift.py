"""ms-swift: a shell script, by its source."""

from __future__ import annotations

import shlex

from qinit.trainers.base import TrainableRun, Trainer
from qinit.trainers.training import Training

TEMPLATE = """\
#!/bin/sh
# {head}
# {origin}
#
#     sh FILE
#
# --adapters is what keeps the start: without it ms-swift makes a new adapter of --lora_rank. --quant_method and
# --quant_bits would quantize the base anew. A row of the data is {{"messages": [...]}}; with --use_chat_template false
# and one message of the assistant's it is plain text.
swift sft \\
  --model {base} \\
  --adapters {start} \\
  --tuner_type lora \\
  --dataset {data} \\
  --max_length 1024 \\
  --output_dir {output} \\
  --num_train_epochs 1 \\
  --learning_rate {rate} \\
  --per_device_train_batch_size 1 \\
  --gradient_accumulation_steps 16 \\
  --gradient_checkpointing true \\
  --gradient_checkpointing_kwargs '{{"use_reentrant": false}}' \\
  --logging_steps 10 \\
  --save_steps 100
"""


class MsSwiftTrainer(Trainer):
    name = "ms-swift"
    title = "ms-swift"
    suffix = ".sh"
    command = "sh {file}"
    seen = "not run: by the source of ms-swift 4.6.0.dev0 (3602360)"
    distribution = "ms-swift"

    def config(self, run: TrainableRun, training: Training) -> str:
        return TEMPLATE.format(
            **self.head(run),
            base=shlex.quote(run.base),
            start=shlex.quote(run.start),
            data=shlex.quote(training.name),
            rate=training.python_rate,
            output=shlex.quote(self.output(run)),
        )
