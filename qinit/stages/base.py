"""What every stage between the walk and the writers offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qinit.calibration.walk import OpenBlock
from qinit.linalg.low_rank import LowRank
from qinit.plan.parts import LayerPlan


@dataclass(frozen=True)
class Repaired:
    """What a layer has come to: Q [out, in] in float32 as its loader will have it, and L = B A as PEFT computes it."""

    layer: LayerPlan
    quantized: torch.Tensor
    low_rank: LowRank


class Stage(ABC):
    """Something that is done with a block once all of its layers are solved. Stateless.

    It needs calibration in mode `sequential`, and a model that runs block by block.
    """

    name: str

    @abstractmethod
    def improved(self, block: OpenBlock, layers: Mapping[str, Repaired]) -> dict[str, LowRank]:
        """Return other factors, of the same ranks, for those of the layers (by name) that get some.

        `block` has the original module, the repaired one with Q + B A in its place, and the text in front of both:
        `block.states.original.read(batch)` and `block.states.repaired.read(batch)` for each of `block.states.batches`,
        and `block.states.calls.of(batch, block.states.index)`, which runs a module on hidden states; of the repaired
        model `block.states.repaired_calls`, as a decoder reads another encoder there. Gradients are off.
        """
