"""How far a training has come, and the best that it has found: enough, in one file, to go on to the last bit."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

OF_ADAM = ("step", "exp_avg", "exp_avg_sq")


class Course:
    """The `parameters` that an Adam `optimizer` trains, one to a group; `step` are done, `before` and `after` are the
    held-out losses of the start and of the best iterate, and `stale` evaluations have passed since that."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, file: Path | None) -> None:
        self.parameters, self.optimizer, self.file = list(parameters), optimizer, file
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.step = self.stale = 0
        self.before = self.after = math.inf

    def judge(self, loss: float) -> None:
        """Take the held-out loss of where the training stands; keep that if it is the best, and how to go on."""
        self.stale += 1
        if loss < self.after:
            self.after, self.stale = loss, 0
            for kept, parameter in zip(self.best, self.parameters, strict=True):
                kept.copy_(parameter.detach())
        if self.file is not None:
            self._save(self.file)

    def restore_best(self) -> None:
        for kept, parameter in zip(self.best, self.parameters, strict=True):
            parameter.data.copy_(kept)

    def resume(self) -> bool:
        """Go on where the file says; False where there is none, or none that is whole."""
        try:
            return self.file is not None and self._load(self.file)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return False

    def _save(self, file: Path) -> None:
        tensors = {f"{number}.best": value for number, value in enumerate(self.best)}
        for number, parameter in enumerate(self.parameters):
            state = self.optimizer.state.get(parameter, {})  # nothing where no gradient has come yet
            tensors |= {f"{number}.now": parameter.detach()} | {
                f"{number}.{part}": state[part] for part in OF_ADAM if part in state
            }
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        numbers = {"step": self.step, "stale": self.stale, "before": self.before, "after": self.after}
        new = file.with_name(file.name + ".new")
        save_file(tensors, new, {"": json.dumps({**numbers, "sum": _sum(tensors)})})
        with new.open("rb") as handle:
            os.fsync(handle.fileno())
        new.replace(file)

    def _load(self, file: Path) -> bool:
        if not file.exists():
            return False
        with safe_open(file, "pt") as stored:
            numbers = json.loads(stored.metadata()[""])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no dict
        shapes = [tensors[f"{number}.now"].shape for number in range(len(self.parameters))]
        if numbers["sum"] != _sum(tensors) or shapes != [parameter.shape for parameter in self.parameters]:
            return False
        for number, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"{number}.now"])
            self.best[number].copy_(tensors[f"{number}.best"])
            found = {part: tensors[f"{number}.{part}"] for part in OF_ADAM if f"{number}.{part}" in tensors}
            # As `load_state_dict` does: the count of steps stays on the CPU.
            state = {part: value if part == "step" else value.to(parameter.device) for part, value in found.items()}
            self.optimizer.state[parameter].update(state)
        self.step, self.stale = int(numbers["step"]), int(numbers["stale"])
        self.before, self.after = float(numbers["before"]), float(numbers["after"])
        return True


def _sum(tensors: Mapping[str, torch.Tensor]) -> int:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(memoryview(tensors[name].flatten().view(torch.uint8).numpy().data), found)
    return found
