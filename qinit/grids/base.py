"""What every grid offers, and the quantized matrix that it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Quantized:
    """Q [out, in] as a grid holds it; groups run along the inputs, the last one may be short.

    codes uint8 [out, in]; scales float32 [out, groups]; zeros uint8 [out, groups], None for a grid without.
    """

    bits: int
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None


class Grid(Protocol):
    """A set of values and the search for scales on it. Stateless."""

    name: str
    bits: tuple[int, ...]  # widths that the grid offers
    searches: tuple[str, ...]  # scale searches that the grid offers

    def quantize(
        self,
        target: torch.Tensor,
        weight: torch.Tensor,
        *,
        bits: int,
        group_size: int,
        search: str,
        previous: Quantized | None = None,
    ) -> tuple[Quantized, torch.Tensor]:
        """Round `target` [out, in] (float32) to the grid.

        Returns the quantized matrix and the residual E = weight - Q (float32, [out, in]): what is left of
        the layer's weight. `previous`, the result for a nearby target, may be used to search around its
        scales only.
        """
        ...

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        """Return Q in float32, [out, in]."""
        ...

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        """Bits per weight that this grid's codes, scales and zeros take, packed."""
        ...
