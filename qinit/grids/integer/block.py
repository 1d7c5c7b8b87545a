"""The columns that one step of rounding under H works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Block:
    """The columns that a step works on, and how it searches scales (ratios empty: they are given)."""

    columns: slice
    levels: int
    group_size: int
    ratios: torch.Tensor
    refinements: int
    zero_range: tuple[int, int] = (0, 0)  # least and largest zero point; not looked at where scales are given
