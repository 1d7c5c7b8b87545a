"""The factors of a run's LoRA adapter, for forms that have one scale over all modules, or the same alpha for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinit.adapters.lora import LoraAdapter
from qinit.exports.finished import FinishedRun
from qinit.files.tensors import StoredTensor
from qinit.source.targets import LinearModule


@dataclass(frozen=True)
class Factors:
    """A [rank, in] and B [out, rank] of a module, as they are stored, and the scale s of W x + s B A x."""

    module: LinearModule
    scale: float
    a: StoredTensor
    b: StoredTensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def read(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B in float32 for a reader that multiplies B A with `scale`; B is as stored where it is s."""
        b = self.b.read().float()
        return self.a.read().float(), b if scale == self.scale else b * (self.scale / scale)


def no_factors(run: FinishedRun) -> str | None:
    """Return why a run's adapter is not just factors of its linear modules, with what to do, or None."""
    adapter, linear = run.adapter, {module.name: module for module in run.architecture.linear}
    if not isinstance(adapter.kind, LoraAdapter):
        return f"its reader knows LoRA alone, and the adapter is {adapter.kind.peft_type}"
    if adapter.kind.reads_base:
        return "its reader knows LoRA alone, and the adapter is DoRA; merge it instead"
    if whole := adapter.settings.get("modules_to_save"):
        return f"the adapter holds whole modules beside its factors ({', '.join(whole)}); merge it instead"
    for name, parts in adapter.parts.items():
        module = linear.get(name)
        if module is None:
            return f"the adapter is on {name}, and its reader takes one on the linear layers of the blocks alone"
        found = (tuple(parts["A"].shape[1:]), tuple(parts["B"].shape[:1]))
        if found != ((module.in_features,), (module.out_features,)):
            shape = f"{module.out_features} x {module.in_features}"
            return f"the adapter is for another base: its {name} is not {shape}"
    return None


def factors(run: FinishedRun) -> list[Factors]:
    """Return the factors of every module, in the model's order. There must be nothing else: `no_factors`."""
    kind, settings = run.adapter.kind, run.adapter.settings
    assert isinstance(kind, LoraAdapter)
    found = []
    for module in run.architecture.linear:
        if parts := run.adapter.parts.get(module.name):
            scale = kind.scale(module.name, parts["A"].shape[0], settings)
            found.append(Factors(module, scale, parts["A"], parts["B"]))
    return found
