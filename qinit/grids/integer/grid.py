"""The integer grid: W ~ s (q - z), q and z unsigned integers of `bits` bits, s float16, one pair per group."""

from __future__ import annotations

from typing import Any

import torch

from qinit.grids.base import Grid, Quantized
from qinit.grids.integer.candidates import NEARBY, REFINEMENTS, clip_ratios, zero_points
from qinit.grids.integer.kernels import kernels_for
from qinit.grids.integer.rounding import descend, round_gptq
from qinit.linalg.chunks import grouped, row_chunks
from qinit.linalg.hessian import Hessian


class IntegerGrid(Grid):
    name = "int"
    bits: tuple[int, ...] = (2, 3, 4, 8)
    searches: tuple[str, ...] = ("minmax", "mse")
    feeds_back = True
    symmetric = False

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
        if search != "mse":
            ratios, refinements, previous = torch.tensor([1.0]), 0, None
        else:
            ratios, refinements = clip_ratios(bits) if previous is None else torch.tensor(NEARBY), REFINEMENTS
        arguments = (target, weight, bits, group_size, ratios, refinements, previous, zero_points(bits, self.symmetric))
        return kernels_for(weight.device).quantize(*arguments)

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        assert quantized.zeros is not None
        result = torch.empty(quantized.codes.shape, dtype=torch.float32, device=quantized.codes.device)
        for rows in row_chunks(*result.shape, device=result.device):
            codes = grouped(quantized.codes[rows], quantized.group_size).float()
            values = (codes - quantized.zeros[rows, :, None].float()) * quantized.scales[rows, :, None]
            result[rows] = values.flatten(1)[:, : result.shape[1]]
        return result

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        return bits + (16 + bits) / group_size

    def round_gptq(self, target: torch.Tensor, hessian: Hessian, **options: Any) -> tuple[Quantized, torch.Tensor]:
        return round_gptq(target, hessian, symmetric=self.symmetric, **options)

    def descend(self, quantized: Quantized, residual: torch.Tensor, hessian: torch.Tensor, *options: Any) -> None:
        descend(quantized, residual, hessian, *options)


class SymmetricGrid(IntegerGrid):
    """The same with one of two zero points, 2^(b-1) - 1 and 2^(b-1): what forms without zero points hold too, with a
    scale of either sign."""

    name = "sym"
    symmetric = True
