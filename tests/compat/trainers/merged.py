"""The command for merging that stands in a trainer's file, carried out: base and adapter become one model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch

from tests.compat.trainers.attempt import Attempt

BEFORE = "#     "


def check_merge(attempt: Attempt) -> str:
    """Merge what was trained, where the file says how; returns words for what was seen."""
    command = merge_command(attempt.text)
    if command is None:
        return ""
    output = attempt.trainer.output(attempt.run)
    attempt.launch([word.replace(output, "trained") for word in command], attempt.place)
    _compare(attempt.run.directory, attempt.place / "trained", attempt.place / "trained-merged")
    return ", merged"


def merge_command(text: str) -> list[str] | None:
    """Return the last command in a file's comments, if it is one that exports."""
    lines = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith(BEFORE))
    commands = [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines() if " export " in line]
    return commands[-1] if commands else None


def _compare(base: Path, adapter: Path, merged: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(place: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)

    expected = PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().state_dict()
    found = load(merged).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # it is saved in bfloat16
        assert torch.allclose(found[name], tensor, rtol=2**-7, atol=2**-9), f"{name} is not Q + s B A"
