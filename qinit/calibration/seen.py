"""A layer with what it has seen, ready to be solved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from qinit.plan.parts import LayerPlan
from qinit.solver.statistics import Statistics


@dataclass(frozen=True)
class Seen:
    """A layer, its weight [out, in] in float32 and, when asked, what it has seen (None if the text never reached it).
    Where `repair` is given, it is to be called with the layer and the weight that the trainer will have. Up to the one
    that is `last`, layers are solved side by side: none of them sees the repair of another."""

    layer: LayerPlan
    weight: torch.Tensor
    measured: Callable[[], Statistics | None]
    repair: Callable[[LayerPlan, torch.Tensor], None] | None = None
    last: bool = True

    @cached_property
    def statistics(self) -> Statistics | None:
        return self.measured()
