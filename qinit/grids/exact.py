"""The exact grid: every value is on it, so no bit of a weight changes; for adapters on a 16-bit base. And the grid of
one matrix, where Q is that of a base that exists and is not searched for."""

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


class GivenGrid(ExactGrid):
    """Holds one matrix, Q [out, in] in float32, and rounds whatever it is asked to round to that."""

    def __init__(self, given: torch.Tensor) -> None:
        self.given = given

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
        return Quantized(bits, group_size, self.given, weight.new_empty(len(weight), 0)), weight - self.given
