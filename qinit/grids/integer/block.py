"""What the kernels work on: the columns of one step of rounding under H, and the memory that a search fills."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinit.grids.base import Quantized


@dataclass(frozen=True)
class Block:
    """The columns that a step works on, and how it searches scales (ratios empty: they are given)."""

    columns: slice
    levels: int
    group_size: int
    ratios: torch.Tensor
    refinements: int
    zero_range: tuple[int, int] = (0, 0)  # least and largest zero point; not looked at where scales are given


def room_for(
    weight: torch.Tensor, bits: int, group_size: int, previous: Quantized | None = None
) -> tuple[Quantized, torch.Tensor]:
    """Return memory for the Q of a weight [out, in] and for what Q leaves, on its device; with the scales and zero
    points of a `previous` Q, where there is one to search around."""
    rows, columns = weight.shape
    groups, device = -(-columns // group_size), weight.device
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=device)
    scales = torch.empty((rows, groups), device=device)
    zeros = torch.empty((rows, groups), dtype=torch.uint8, device=device)
    if previous is not None:
        assert previous.zeros is not None
        scales.copy_(previous.scales)
        zeros.copy_(previous.zeros)
    return Quantized(bits, group_size, codes, scales, zeros), torch.empty((rows, columns), device=device)
