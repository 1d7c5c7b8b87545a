"""How far a training has come, and the best that it has found: enough, in one file, to go on to the last bit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


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
        """Go on where the file says; False where there is none, or none that can be read."""
        try:
            return self.file is not None and self._load(self.file)
        except (OSError, SafetensorError, KeyError, ValueError):
            return False

    def _save(self, file: Path) -> None:
        tensors = {f"{number}.best": value for number, value in enumerate(self.best)}
        for number, parameter in enumerate(self.parameters):
            tensors[f"{number}.now"] = parameter.detach()
            tensors |= {f"{number}.{moment}": self.optimizer.state[parameter][moment] for moment in MOMENTS}
        numbers = {"step": self.step, "stale": self.stale, "before": self.before, "after": self.after}
        new = file.with_name(file.name + ".new")
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, new, {"": json.dumps(numbers)})
        with new.open("rb") as handle:
            os.fsync(handle.fileno())
        new.replace(file)

    def _load(self, file: Path) -> bool:
        if not file.exists():
            return False
        with safe_open(file, "pt") as stored:
            numbers = json.loads(stored.metadata()[""])
            for number, parameter in enumerate(self.parameters):
                device = parameter.device
                parameter.data.copy_(stored.get_tensor(f"{number}.now"))
                self.best[number].copy_(stored.get_tensor(f"{number}.best"))
                state = self.optimizer.state[parameter]
                state["step"] = torch.tensor(float(numbers["step"]))
                state |= {moment: stored.get_tensor(f"{number}.{moment}").to(device) for moment in MOMENTS}
        self.step, self.stale = int(numbers["step"]), int(numbers["stale"])
        self.before, self.after = float(numbers["before"]), float(numbers["after"])
        return True
