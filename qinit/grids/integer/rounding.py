"""Rounding to the integer grid under a Hessian: error feedback, and coordinate descent after it.

Both lower tr(E H E') over Q, with E = X - Q and H = E[x x'] the second moment of the layer's inputs. Rows are
independent; columns go block by block, so that all but the work inside a block is one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qinit.grids.base import DAMPING, Quantized
from qinit.grids.integer.block import Block
from qinit.grids.integer.candidates import REFINEMENTS, clip_ratios, zero_points
from qinit.grids.integer.kernels import kernels_for
from qinit.grids.integer.rounding_torch import fit_weighted
from qinit.linalg.chunks import ALL, row_chunks
from qinit.linalg.hessian import Hessian, damped_cholesky

BLOCK = 128  # columns, or one group if that is more


def round_gptq(
    target: torch.Tensor,
    hessian: Hessian,
    *,
    bits: int,
    group_size: int,
    search: str,
    damp: float = DAMPING,
    act_order: bool = False,
    factor: torch.Tensor | None = None,
    in_place: bool = False,
    symmetric: bool = False,
    shards: Sequence[slice] = (ALL,),
) -> tuple[Quantized, torch.Tensor]:
    """Round `target` X [out, in] with error feedback under `hessian` [in, in], or what a function makes, which spares a
    copy; return Q and the residual X - Q.

    GPTQ (arXiv:2210.17323) in the form of LDLQ (QuIP, arXiv:2307.13304, theorem 6: the same codes from one
    Cholesky factor and no inverse). With H = L D L', L unit lower triangular, the error is
    sum_k D_k |(E L)_k|^2; so, from the last column to the first, Q_k = round(X_k + sum_{j>k} E_j L_jk).
    A group's scale is found when the group is reached, for what the feedback has made of it, weighted by D. With
    `act_order` columns are taken by falling H_kk, and scales are found beforehand, weighted by the diagonal of H.
    With `symmetric`, zero points are the two about the middle. `factor` [in, in] is `damped_cholesky` of the same,
    where it is at hand: overwritten, or not used with `act_order`. `in_place`, the residual takes the target's place.
    Of the rows only these `shards` are rounded, one after the other.
    Raises QinitError if no damping makes H positive definite.
    """
    columns = target.shape[1]
    ratios, refinements = (clip_ratios(bits), REFINEMENTS) if search == "mse" else (torch.ones(1), 0)
    ratios, zero_range = ratios.to(target.device), zero_points(bits, symmetric)
    quantized = _empty(target, bits, group_size)
    order = None
    x, group_of = target.contiguous(), torch.arange(columns, device=target.device) // group_size
    if act_order:
        hessian = hessian() if callable(hessian) else hessian
        order = torch.argsort(hessian.diagonal(), stable=True)  # the last is taken first
        _find_scales(target, hessian.diagonal(), quantized, ratios, refinements, zero_range)
        ratios = ratios[:0]
        hessian, x, group_of = hessian[order][:, order], target[:, order].contiguous(), group_of[order]
    feedback = damped_cholesky(hessian, damp) if factor is None or order is not None else factor
    conditional = feedback.diagonal().square()
    feedback.div_(feedback.diagonal().clone())
    residual = x if in_place else torch.empty_like(x)  # a column of x is not read again once it is rounded
    step = kernels_for(target.device).feed_back_block
    for part in reversed(column_blocks(columns, group_size)):
        block = Block(part, 2**bits - 1, group_size, ratios, refinements, zero_range)
        weights, own = conditional[part] / conditional[part].mean(), feedback[part, part].contiguous()
        for rows in shards:
            moved = x[rows, part].clone(memory_format=torch.contiguous_format)  # a view of it all would be x itself
            if part.stop < columns:
                moved = torch.addmm(moved, residual[rows, part.stop :], feedback[part.stop :, part])
            step(block, quantized.rows(rows), x[rows], moved, residual[rows], own, weights, group_of[part])
    if order is not None:
        back = torch.argsort(order)
        quantized = replace(quantized, codes=quantized.codes[:, back].contiguous())
        residual = residual[:, back].contiguous()
    return quantized, residual


def descend(
    quantized: Quantized,
    residual: torch.Tensor,
    hessian: torch.Tensor,
    passes: int = 1,
    shards: Sequence[slice] = (ALL,),
) -> None:
    """One sweep of coordinate descent on tr(E H E'), in place; `residual` is E = X - Q [out, in].

    Block by block, with so many `passes` over each: every code goes to its best value, all others held; after a group's
    codes, its scale does. Neither step raises the error. Of the rows only these `shards` are looked at.
    """
    step = kernels_for(residual.device).descend_block
    for part in column_blocks(residual.shape[1], quantized.group_size):
        block = Block(part, 2**quantized.bits - 1, quantized.group_size, torch.empty(0), 0)
        own = hessian[part, part].contiguous()
        for rows in shards:
            gradient = residual[rows] @ hessian[:, part]
            step(block, quantized.rows(rows), gradient, residual[rows], own, passes)


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


def _find_scales(
    target: torch.Tensor,
    weights: torch.Tensor,
    quantized: Quantized,
    ratios: torch.Tensor,
    refinements: int,
    zero_range: tuple[int, int],
) -> None:
    """Write the scales and zeros of all groups at once, without feedback."""
    assert quantized.zeros is not None
    size = quantized.group_size
    for group, first in enumerate(range(0, target.shape[1], size)):
        for rows in row_chunks(len(target), size, device=target.device):
            part = slice(first, first + size)
            search = 2**quantized.bits - 1, ratios, refinements, zero_range
            scale, zero = fit_weighted(target[rows, part], weights[part], *search)
            quantized.scales[rows, group] = scale
            quantized.zeros[rows, group] = zero.to(torch.uint8)
