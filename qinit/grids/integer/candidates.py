"""What the search for a group's scale tries: clipping ratios, and how often a scale is refined."""

from __future__ import annotations

import torch

CANDIDATES = 16  # with the refinement below, 24 or 48 gain less than 0.1 % of the error
NEARBY = (0.88, 0.95, 1.0, 1.06, 1.14)  # times the previous scale, when there is one
REFINEMENTS = 2
# Least clipping ratio worth trying: with fewer levels, more of a group's range is better clipped.
LEAST_RATIO = {2: 0.25, 3: 0.4, 4: 0.6, 8: 0.95}
F16_MAX = 65504.0
TINY = 1e-30


def zero_points(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the least and the largest zero point that is searched. With the two about the middle, a group is
    {-2^(b-1), ..., 2^(b-1) - 1} s with a scale of either sign: z = 2^(b-1) - 1 is the other one mirrored."""
    half = 2 ** (bits - 1)
    return (half - 1, half) if symmetric else (0, 2 * half - 1)


def clip_ratios(bits: int) -> torch.Tensor:
    return torch.linspace(LEAST_RATIO[bits], 1.0, CANDIDATES)
