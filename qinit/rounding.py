"""Rounding to the integer grid under a Hessian: error feedback, and coordinate descent after it.

Both lower tr(E H E') over Q, with E = X - Q and H = E[x x'] the second moment of the layer's inputs. Rows are
independent; columns go block by block, so that all but the work inside a block is one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qinit.grids.base import Quantized
from qinit.grids.integer import F16_MAX, REFINEMENTS, TINY, clip_ratios
from qinit.linalg.chunks import row_chunks
from qinit.linalg.hessian import damped_cholesky

DAMPING = 0.01  # of H's mean diagonal, as GPTQ's
BLOCK = 128  # columns, or one group if that is more


@dataclass(frozen=True)
class Block:
    """The columns that a step works on, and how it searches scales (ratios empty: they are given)."""

    columns: slice
    levels: int
    group_size: int
    ratios: torch.Tensor
    refinements: int


def round_gptq(
    target: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    search: str,
    damp: float = DAMPING,
    act_order: bool = False,
    factor: torch.Tensor | None = None,
) -> tuple[Quantized, torch.Tensor]:
    """Round `target` X [out, in] with error feedback under `hessian` [in, in]; return Q and the residual X - Q.

    GPTQ (arXiv:2210.17323) in the form of LDLQ (QuIP, arXiv:2307.13304, theorem 6: the same codes from one
    Cholesky factor and no inverse). With H = L D L', L unit lower triangular, the error is
    sum_k D_k |(E L)_k|^2; so, from the last column to the first, Q_k = round(X_k + sum_{j>k} E_j L_jk).
    A group's scale is found when the group is reached, for what the feedback has made of it, weighted by D. With
    `act_order` columns are taken by falling H_kk, and scales are found beforehand, weighted by the diagonal of H.
    `factor` [in, in] is `damped_cholesky` of the same, where it is at hand: overwritten, or not used with `act_order`.
    Raises QinitError if no damping makes H positive definite.
    """
    columns = target.shape[1]
    ratios, refinements = (clip_ratios(bits), REFINEMENTS) if search == "mse" else (torch.ones(1), 0)
    quantized = _empty(target, bits, group_size)
    order = torch.argsort(hessian.diagonal(), stable=True) if act_order else None  # the last is taken first
    x, group_of = target, torch.arange(columns, device=target.device) // group_size
    if order is not None:
        _find_scales(target, hessian.diagonal(), quantized, ratios, refinements)
        ratios = ratios[:0]
        hessian, x, group_of = hessian[order][:, order], target[:, order].contiguous(), group_of[order]
    feedback = damped_cholesky(hessian, damp) if factor is None or order is not None else factor
    conditional = feedback.diagonal().square()
    feedback.div_(feedback.diagonal().clone())
    residual = torch.empty_like(x)
    step = _steps(target)[0]
    for part in reversed(column_blocks(columns, group_size)):
        moved = x[:, part].clone(memory_format=torch.contiguous_format)  # a view of it all would be x itself
        if part.stop < columns:
            moved = torch.addmm(moved, residual[:, part.stop :], feedback[part.stop :, part])
        block = Block(part, 2**bits - 1, group_size, ratios, refinements)
        weights, own = conditional[part] / conditional[part].mean(), feedback[part, part].contiguous()
        step(block, quantized, x, moved, residual, own, weights, group_of[part])
    if order is not None:
        back = torch.argsort(order)
        quantized = replace(quantized, codes=quantized.codes[:, back].contiguous())
        residual = residual[:, back].contiguous()
    return quantized, residual


def descend(quantized: Quantized, residual: torch.Tensor, hessian: torch.Tensor, passes: int = 1) -> None:
    """One sweep of coordinate descent on tr(E H E'), in place; `residual` is E = X - Q [out, in].

    Block by block, with so many `passes` over each: every code goes to its best value, all others held; after a group's
    codes, its scale does. Neither step raises the error.
    """
    step = _steps(residual)[1]
    for part in column_blocks(residual.shape[1], quantized.group_size):
        gradient = residual @ hessian[:, part]
        block = Block(part, 2**quantized.bits - 1, quantized.group_size, torch.empty(0), 0)
        step(block, quantized, gradient, residual, hessian[part, part].contiguous(), passes)


def column_blocks(columns: int, group_size: int) -> list[slice]:
    """Cut the columns into blocks of whole groups, the last one shorter."""
    size = max(group_size, BLOCK // group_size * group_size)
    return [slice(first, min(first + size, columns)) for first in range(0, columns, size)]


def _empty(target: torch.Tensor, bits: int, group_size: int) -> Quantized:
    rows, columns = target.shape
    groups = -(-columns // group_size)
    return Quantized(
        bits,
        group_size,
        codes=torch.zeros((rows, columns), dtype=torch.uint8, device=target.device),
        scales=torch.ones((rows, groups), device=target.device),
        zeros=torch.zeros((rows, groups), dtype=torch.uint8, device=target.device),
    )


def _steps(tensor: torch.Tensor) -> tuple:
    if tensor.device.type == "cpu":
        from qinit.rounding_cpu import descend_block, feed_back_block

        return feed_back_block, descend_block
    return feed_back_block_torch, descend_block_torch


def _find_scales(
    target: torch.Tensor, weights: torch.Tensor, quantized: Quantized, ratios: torch.Tensor, refinements: int
) -> None:
    """Write the scales and zeros of all groups at once, without feedback."""
    assert quantized.zeros is not None
    size = quantized.group_size
    for group, first in enumerate(range(0, target.shape[1], size)):
        for rows in row_chunks(len(target), size):
            part = slice(first, first + size)
            scale, zero = fit_weighted(target[rows, part], weights[part], 2**quantized.bits - 1, ratios, refinements)
            quantized.scales[rows, group] = scale
            quantized.zeros[rows, group] = zero.to(torch.uint8)


def fit_weighted(
    x: torch.Tensor, weights: torch.Tensor, levels: int, ratios: torch.Tensor, refinements: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find scales [rows] (float16 values) and zero points [rows] for x [rows, n] under column weights [n]."""
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    base = (high - low) / levels
    centre = torch.floor(-low / base.clamp(min=TINY) + 0.5)
    scale, zero, gain = base, centre, torch.zeros_like(base)
    if len(ratios) > 1:
        for ratio in ratios.tolist():
            for shift in (-1.0, 0.0, 1.0):
                tried = centre + shift
                xc, cc = _weighted_sums(x, weights, base * ratio, tried, levels)
                better = (tried >= 0) & (tried <= levels) & (cc > 0) & (xc > 0) & (xc * xc > gain * cc)
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
    """Round one block from its last column to its first: what CUDA runs, and the CPU kernel's reference.

    `moved` [out, b] is x with the feedback of the columns behind the block; feedback [b, b] is L's block.
    """
    assert quantized.zeros is not None
    first = block.columns.start
    groups = group_of.tolist()
    for k in reversed(range(moved.shape[1])):
        group = groups[k]
        if len(block.ratios) and (k + 1 == len(groups) or groups[k + 1] != group):
            start = max(k + 1 - block.group_size, groups.index(group))
            scale, zero = fit_weighted(
                moved[:, start : k + 1], weights[start : k + 1], block.levels, block.ratios, block.refinements
            )
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
