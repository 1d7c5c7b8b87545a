"""A grid with its zero point in the middle: what formats hold that have no zero points, half = 2^(bits-1) for all.

A group with z = half - 1 is one with z = half once it is flipped: s (q - (half - 1)) = -s ((2 half - 1 - q) - half).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qinit.exports.flip import flipped
from qinit.grids import Quantized
from qinit.grids.integer.candidates import zero_points

if TYPE_CHECKING:
    from qinit.exports.finished import FinishedRun


def half(bits: int) -> int:
    """Return the zero point of the symmetric grid: its values are -half to half - 1, times the scale."""
    return zero_points(bits, symmetric=True)[1]


def other_zeros(zeros: torch.Tensor, bits: int) -> int:
    """Return how many zero points are neither half - 1 nor half, so that `symmetric` cannot hold their groups."""
    return int(((zeros != half(bits) - 1) & (zeros != half(bits))).sum())


def symmetric(quantized: Quantized) -> Quantized:
    """Return the same Q with the zero point half in all groups; scales get a sign. The codes given are not changed.

    Raises ValueError for a grid without zero points, and if there are `other_zeros`.
    """
    zeros, bits = quantized.zeros, quantized.bits
    if zeros is None:
        raise ValueError("a grid without zero points")
    if others := other_zeros(zeros, bits):
        raise ValueError(f"{others} of {zeros.numel()} groups have a zero point other than {_both(bits)}")
    return flipped(quantized, zeros != half(bits))


def not_symmetric(run: FinishedRun) -> str | None:
    """Return why `symmetric` cannot hold a run, with what to do, or None. Only the zero points are read."""
    others = groups = 0
    widths = set()
    for module in run.architecture.linear:
        found = run.weights.grid(module)
        if found is None or found.zeros is None:
            continue
        if strange := other_zeros(found.zeros, found.bits):
            widths.add(found.bits)
            others += strange
        groups += found.zeros.numel()
    if not groups:
        return "the run stores no codes; run `qinit eqft` with --format gptq"
    if not others:
        return None
    allowed = ", ".join(f"{_both(bits)} at {bits} bits" for bits in sorted(widths))
    return (
        f"{others} of {groups} groups have a zero point other than {allowed}, and this form has none of its own; "
        "run `qinit eqft` again with --symmetric, which solves for that grid"
    )


def _both(bits: int) -> str:
    return f"{half(bits) - 1} or {half(bits)}"
