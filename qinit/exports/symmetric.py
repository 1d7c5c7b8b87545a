"""A grid with its zero point in the middle: what formats hold that have no zero points, half = 2^(bits-1) for all.

A group with z = half - 1 is one with z = half whose codes are taken from the other end and whose scale is negative:
s (q - (half - 1)) = -s ((2 half - 1 - q) - half). Float arithmetic is symmetric in the sign, so the values are equal to
the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qinit.grids import Quantized
from qinit.linalg.chunks import row_chunks

if TYPE_CHECKING:
    from qinit.exports.finished import FinishedRun


def half(bits: int) -> int:
    """Return the zero point of the symmetric grid: its values are -half to half - 1, times the scale."""
    return 1 << (bits - 1)


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
    flipped = zeros != half(bits)
    codes = torch.empty_like(quantized.codes)
    width = codes.shape[1]
    for rows in row_chunks(*codes.shape):  # 2^bits - 1 - q is q with all its bits changed
        masks = flipped[rows].to(torch.uint8) * (2**bits - 1)
        masks = masks.repeat_interleave(quantized.group_size, dim=1)[:, :width]
        torch.bitwise_xor(quantized.codes[rows], masks, out=codes[rows])
    scales = torch.where(flipped, -quantized.scales, quantized.scales)
    return replace(quantized, codes=codes, scales=scales, zeros=torch.full_like(zeros, half(bits)))


def not_symmetric(run: FinishedRun) -> str | None:
    """Return why `symmetric` cannot hold a run, with what to do, or None. Only the zero points are read."""
    others = groups = packed = 0
    widths = set()
    for module in run.architecture.linear:
        found = run.weights.zeros(module)
        if found is None:
            continue
        bits, zeros = found
        packed += 1
        if strange := other_zeros(zeros, bits):
            widths.add(bits)
            others += strange
        groups += zeros.numel()
    if not packed:
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
