"""A trainer on a run: its start kept to the last bit, its loss falling, and gone on with after a break."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from qinit.trainers import TrainableRun, Trainer
from qinit.trainers.training import Training
from tests.helpers import edit_json, quantize
from tests.models import make_reader, words

STEPS, BREAK = 6, 3
ADAPTER = "adapter_model.safetensors"
# Of all trainers, by the names that they have for it.
BATCH = {"per_device_train_batch_size": 4, "micro_batch_size": 4}
TEXTS = [words(*range(first, first + 12)) for first in (5, 40, 80, 120)] * 6

Launch = Callable[[list[str], Path], None]  # a command and the directory that it runs in


def make_runs(place: Path, formats: tuple[str, ...]) -> dict[str, Path]:
    """Quantize a tiny model whose layers count, in each format; returns the runs' directories."""
    source = make_reader(place / "source", initializer_range=0.1)
    # As transformers 4 knows it too.
    edit_json(source / "tokenizer_config.json", lambda config: config.update(tokenizer_class="PreTrainedTokenizerFast"))
    for fmt in formats:
        quantize(source, place / fmt, format=fmt, bits=2, group_size=32, device="cpu")
    return {fmt: place / fmt for fmt in formats}


def write_data(place: Path) -> Path:
    """Write texts, which are also instructions with answers, with the file that LLaMA-Factory looks them up in."""
    rows = [{"text": text, "instruction": text[:20], "output": text[20:]} for text in TEXTS]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"train": {"prompt": "instruction", "response": "output"}, "plain": {"prompt": "text"}}
    entries = {name: {"file_name": "train.jsonl", "columns": each} for name, each in columns.items()}
    (place / "dataset_info.json").write_text(json.dumps(entries))
    return place / "train.jsonl"


class Attempt:
    """What is written for a trainer, carried out in a directory of its own by `launch`."""

    def __init__(
        self, trainer: Trainer, run: Path, place: Path, launch: Launch, changes: Mapping[str, Any] | None = None
    ) -> None:
        self.trainer, self.run, self.place, self.launch = trainer, TrainableRun.open(run), place, launch
        assert trainer.cannot_take(self.run) is None
        place.mkdir(parents=True)
        self.text = trainer.config(self.run, Training.on(str(write_data(place))))
        batch = {key: value for key, value in BATCH.items() if key in self.text}
        common = {"gradient_accumulation_steps": 1, "logging_steps": 1, "save_steps": BREAK, "max_steps": STEPS}
        self.changes = {**common, **batch, **(changes or {})}

    def check(self) -> str:
        """Check all of it; returns what was seen in a few words."""
        start = load_file(self.run.directory / "eqft_init" / ADAPTER)
        untrained, _ = self.train("start", learning_rate=0.0, max_steps=1)
        assert untrained.keys() == start.keys()
        assert all(torch.equal(untrained[name], start[name]) for name in start), "the start is not kept"
        trained, losses = self.train("trained", learning_rate=1e-2)
        assert losses[-1] < 0.9 * losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
        assert all(not torch.equal(trained[name], start[name]) for name in start), "not all of it was trained"
        half = self.place / "trained" / f"checkpoint-{BREAK}"
        again, rest = self.train("again", learning_rate=1e-2, resume_from_checkpoint=str(half))
        assert rest[-1] == losses[-1], f"gone on with, the loss ends at {rest[-1]} in the place of {losses[-1]}"
        assert all(torch.equal(again[name], trained[name]) for name in start), "gone on with, it ends elsewhere"
        return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, the same when it is broken off"

    def train(self, name: str, **changes: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
        """Run the file with changes; returns the adapter that was saved and the loss of each step."""
        text = edited(self.text, self.trainer.suffix, {"output_dir": name, **self.changes, **changes})
        file = self.place / f"{name}{self.trainer.suffix}"
        file.write_text(text)
        self.launch(shlex.split(self.trainer.command.format(file=file)), self.place)
        out = self.place / name
        last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        return load_file(out / ADAPTER), [row["loss"] for row in history if "loss" in row]


def edited(text: str, suffix: str, changes: Mapping[str, Any]) -> str:
    """Change values of a script or a YAML file; a script gets what it lacks beside its output_dir."""
    if suffix == ".yaml":
        return yaml.safe_dump({**yaml.safe_load(text), **changes})
    for key, value in changes.items():
        text, found = re.subn(rf"\b{key}=[^,)\n]+", lambda _, key=key, value=value: f"{key}={value!r}", text)
        if not found:
            text = text.replace("        output_dir=", f"        {key}={value!r},\n        output_dir=")
    return text
