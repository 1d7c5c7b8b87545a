"""The exact grid: every value is on it, so no bit of a weight changes; for adapters on a 16-bit base."""

from __future__ import annotations

import torch

from qinit.grids.base import Grid, Quantized


class ExactGrid(Grid):
    name = "exact"
    bits: tuple[int, ...] = (16,)
    searches: tuple[str, ...] = ("none",)

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
        return Quantized(bits, group_size, target.clone(), target.new_empty(len(target), 0)), weight - target

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        return quantized.codes.clone()

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        return bits
