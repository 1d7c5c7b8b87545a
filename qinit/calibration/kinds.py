"""What the layers of a block write to, tried once for each kind of block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qinit.calibration.activations import caught
from qinit.calibration.groups import Groups
from qinit.calibration.residual_stream import writes_to
from qinit.plan.parts import LayerPlan
from qinit.processes.group import Processes
from qinit.stream.calls import Call

Kind = tuple[int, type]  # the first block of a row, and the class of its blocks


class Kinds:
    """What layers write to (see Group), by the kind of their block and their name in it. The first process finds it
    out, as all must hold the same."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.known: dict[tuple[int, type, str], str | None] = {}

    def of(self, kind: Kind, inner: str) -> str | None:
        """Return what a layer writes to; None where that is not known."""
        return self.known.get((*kind, inner))

    def find(
        self, kind: Kind, block: nn.Module, layers: Mapping[str, LayerPlan], call: Call, hidden: torch.Tensor
    ) -> None:
        """Try the layers of a block that are as wide as `hidden`, its input for one sample, where that is not done."""
        wide = [inner for inner, layer in layers.items() if _is_wide(layer, hidden)]
        if all((*kind, inner) in self.known for inner in wide):
            return
        found = self.processes.from_first(lambda: _tried(block, layers, call, hidden), "what layers write to")
        self.known |= {(*kind, inner): found.get(inner) for inner in wide}


def _tried(
    block: nn.Module, layers: Mapping[str, LayerPlan], call: Call, hidden: torch.Tensor
) -> dict[str, str | None]:
    """Try the layers that one sample reaches; it takes many passes."""
    found: dict[str, str | None] = {}

    def tried(inner: str) -> str | None:
        if _is_wide(layers[inner], hidden):
            reading = [group.inner for group in groups.found if _reads(group.layers[0], hidden)]
            found[inner] = writes_to(block, block.get_submodule(inner), call, hidden, reading)
        return found.get(inner)

    groups = Groups(layers, tried)
    groups.add(caught(block, call, hidden, layers)[0])
    return found


def _is_wide(layer: LayerPlan, hidden: torch.Tensor) -> bool:
    module = layer.target.module
    return module.expert is None and module.out_features == hidden.shape[-1]


def _reads(layer: LayerPlan, hidden: torch.Tensor) -> bool:
    return layer.target.module.in_features == hidden.shape[-1]
