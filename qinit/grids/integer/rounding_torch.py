"""The block steps of rounding under H in plain torch: the reference for the kernels, and what a GPU without Triton
runs."""

from __future__ import annotations

import torch

from qinit.grids.base import Quantized
from qinit.grids.integer.block import Block
from qinit.grids.integer.candidates import F16_MAX, TINY
from qinit.grids.integer.search_torch import range_of


def fit_weighted(
    x: torch.Tensor,
    weights: torch.Tensor,
    levels: int,
    ratios: torch.Tensor,
    refinements: int,
    zero_range: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find scales [rows] (float16 values) and zero points [rows] for x [rows, n] under column weights [n]."""
    base, centre = range_of(x, levels, zero_range)
    scale, zero, gain = base, centre, torch.zeros_like(base)
    if len(ratios) > 1:
        for ratio in ratios.tolist():
            for shift in (-1.0, 0.0, 1.0):
                tried = centre + shift
                xc, cc = _weighted_sums(x, weights, base * ratio, tried, levels)
                better = (
                    (tried >= zero_range[0]) & (tried <= zero_range[1]) & (cc > 0) & (xc > 0) & (xc * xc > gain * cc)
                )
                gain = torch.where(better, xc * xc / cc, gain)
                scale, zero = torch.where(better, xc / cc, scale), torch.where(better, tried, zero)
    for _ in range(refinements):
        xc, cc = _weighted_sums(x, weights, scale, zero, levels)
        scale = torch.where(cc > 0, xc / cc.clamp(min=TINY), scale)
    scale = scale.clamp(max=F16_MAX).half().float()
    return torch.where(scale > 0, scale, 1.0), zero


def _weighted_sums(
    x: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    c = torch.floor(x / scale.clamp(min=TINY)[:, None] + 0.5)
    c = torch.minimum(torch.maximum(c, -zero[:, None]), levels - zero[:, None])
    return (weights * x * c).sum(1), (weights * c * c).sum(1)


def feed_back_block_torch(
    block: Block,
    quantized: Quantized,
    x: torch.Tensor,
    moved: torch.Tensor,
    residual: torch.Tensor,
    feedback: torch.Tensor,
    weights: torch.Tensor,
    group_of: torch.Tensor,
) -> None:
    """Round one block from its last column to its first.

    `moved` [out, b] is x with the feedback of the columns behind the block; feedback [b, b] is L's block.
    """
    assert quantized.zeros is not None
    first = block.columns.start
    groups = group_of.tolist()
    for k in reversed(range(moved.shape[1])):
        group = groups[k]
        if len(block.ratios) and (k + 1 == len(groups) or groups[k + 1] != group):
            start = max(k + 1 - block.group_size, groups.index(group))
            part = slice(start, k + 1)
            search = block.levels, block.ratios, block.refinements, block.zero_range
            scale, zero = fit_weighted(moved[:, part], weights[part], *search)
            quantized.scales[:, group] = scale
            quantized.zeros[:, group] = zero.to(torch.uint8)
        scale, zero = quantized.scales[:, group], quantized.zeros[:, group].float()
        code = torch.floor(moved[:, k] / scale + 0.5).clamp(min=-zero, max=block.levels - zero)
        error = x[:, first + k] - scale * code
        quantized.codes[:, first + k] = (code + zero).to(torch.uint8)
        residual[:, first + k] = error
        moved[:, :k] += error[:, None] * feedback[k, :k]


def descend_block_torch(
    block: Block,
    quantized: Quantized,
    gradient: torch.Tensor,
    residual: torch.Tensor,
    hessian: torch.Tensor,
    passes: int,
) -> None:
    """Pass over one block; `gradient` [out, b] is (E H)'s block, hessian [b, b] is H's."""
    assert quantized.zeros is not None
    first, width = block.columns.start, gradient.shape[1]
    groups = [(start, min(start + block.group_size, width)) for start in range(0, width, block.group_size)]
    for start, stop in groups * passes:
        group = (first + start) // block.group_size
        scale, zero = quantized.scales[:, group].clone(), quantized.zeros[:, group].float()
        for k in range(start, stop):
            if not hessian[k, k] > 0:
                continue
            old = quantized.codes[:, first + k].float() - zero
            best = torch.floor(old + gradient[:, k] / (hessian[k, k] * scale) + 0.5)
            best = best.clamp(min=-zero, max=block.levels - zero)
            change = (best - old) * scale
            quantized.codes[:, first + k] = (best + zero).to(torch.uint8)
            residual[:, first + k] -= change
            gradient -= change[:, None] * hessian[k]
        codes = quantized.codes[:, first + start : first + stop].float() - zero[:, None]
        image = codes @ hessian[start:stop]
        curvature = (codes * image[:, start:stop]).sum(1)
        slope = (codes * gradient[:, start:stop]).sum(1)
        new = torch.where(curvature > 0, scale + slope / curvature.clamp(min=TINY), scale)
        new = new.clamp(max=F16_MAX).half().float()
        change = new - scale
        better = (new > 0) & (change * (2 * slope - change * curvature) > 0)  # rounded to float16, still better
        change = torch.where(better, change, 0.0)
        quantized.scales[:, group] = scale + change
        residual[:, first + start : first + stop] -= change[:, None] * codes
        gradient -= change[:, None] * image
