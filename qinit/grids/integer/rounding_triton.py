"""The block steps of rounding under H as fused GPU kernels (Triton): a program takes a few rows through all columns of
a block, and holds them in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qinit.grids.base import Quantized
from qinit.grids.integer.block import Block
from qinit.grids.integer.triton_steps import as_f16, fit, on, range_of

TILE = 512  # weights of a block that one program holds, one warp's


def feed_back_block_triton(
    block: Block,
    quantized: Quantized,
    x: torch.Tensor,
    moved: torch.Tensor,
    residual: torch.Tensor,
    feedback: torch.Tensor,
    weights: torch.Tensor,
    group_of: torch.Tensor,
) -> None:
    """As `qinit.grids.integer.rounding_torch.feed_back_block_torch`."""
    assert all(each.is_contiguous() for each in (quantized.codes, x, moved, residual, feedback))
    rows, width = moved.shape
    wide = triton.next_power_of_2(width)
    tile = max(1, TILE // wide)
    with on(x.device):
        _feed_back[(triton.cdiv(rows, tile),)](
            *(quantized.codes, quantized.scales, quantized.zeros, x, moved, residual, feedback),
            *(weights.contiguous(), group_of.contiguous(), block.ratios, rows, x.shape[1], block.columns.start, width),
            *(quantized.scales.shape[1], float(block.levels), *map(float, block.zero_range)),
            *(len(block.ratios) if len(block.ratios) > 1 else 0, block.refinements, len(block.ratios) > 0),
            *(block.group_size, wide, tile),
            num_warps=1,
        )


def descend_block_triton(
    block: Block,
    quantized: Quantized,
    gradient: torch.Tensor,
    residual: torch.Tensor,
    hessian: torch.Tensor,
    passes: int,
) -> None:
    """As `qinit.grids.integer.rounding_torch.descend_block_torch`; `gradient` stays as it is."""
    assert all(each.is_contiguous() for each in (quantized.codes, gradient, residual, hessian))
    rows, width = gradient.shape
    wide = triton.next_power_of_2(width)
    tile = max(1, TILE // wide)
    groups = triton.cdiv(width, block.group_size)
    with on(residual.device):
        _descend[(triton.cdiv(rows, tile),)](
            *(quantized.codes, quantized.scales, quantized.zeros, gradient, residual, hessian),
            *(rows, residual.shape[1], block.columns.start, width, quantized.scales.shape[1], groups),
            *(float(block.levels), passes, block.group_size, triton.next_power_of_2(groups), wide, tile),
            num_warps=1,
        )


@triton.jit
def _feed_back(
    codes,
    scales,
    zeros,
    x,
    moved,
    residual,
    feedback,
    weights,
    group_of,
    ratios,
    rows,
    columns,
    first,
    width,
    groups,
    levels,
    least,
    most,
    tried,
    REFINEMENTS: tl.constexpr,
    FIT: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = row < rows
    k = tl.arange(0, WIDTH)
    inside = there[:, None] & (k < width)[None, :]
    at = (row * columns + first)[:, None] + k[None, :]
    original = tl.load(x + at, inside, 0.0)
    m = tl.load(moved + (row * width)[:, None] + k[None, :], inside, 0.0)
    h = tl.load(weights + k, k < width, 0.0)
    found = tl.zeros((TILE, WIDTH), tl.float32)  # codes
    error = tl.zeros((TILE, WIDTH), tl.float32)
    scale = tl.full((TILE,), 1.0, tl.float32)
    zero = tl.zeros((TILE,), tl.float32)
    for step in range(width):
        now = width - 1 - step
        group = tl.load(group_of + now)
        if FIT:
            if (step == 0) | (now % GROUP == GROUP - 1):
                here = (k >= now - now % GROUP) & (k <= now)
                part = tl.where(here[None, :], m, 0.0)
                base, centre = range_of(
                    tl.minimum(tl.min(part, 1), 0.0), tl.maximum(tl.max(part, 1), 0.0), levels, least, most
                )
                own = tl.where(here, h, 0.0)[None, :]
                scale, zero = fit(part, own, base, centre, ratios, tried, levels, least, most, 0.0, REFINEMENTS)
                tl.store(scales + row * groups + group, scale, there)
                tl.store(zeros + row * groups + group, zero.to(tl.uint8), there)
        else:
            scale = tl.load(scales + row * groups + group, there, 1.0)
            zero = tl.load(zeros + row * groups + group, there, 0).to(tl.float32)
        at_now = (k == now)[None, :]
        c = tl.floor(tl.div_rn(tl.sum(tl.where(at_now, m, 0.0), 1), scale) + 0.5)
        c = tl.minimum(tl.maximum(c, -zero), levels - zero)
        wrong = tl.sum(tl.where(at_now, original, 0.0), 1) - scale * c
        found = tl.where(at_now, (c + zero)[:, None], found)
        error = tl.where(at_now, wrong[:, None], error)
        m += wrong[:, None] * tl.load(feedback + now * width + k, k < width, 0.0)[None, :]
    tl.store(codes + at, found.to(tl.uint8), inside)
    tl.store(residual + at, error, inside)


@triton.jit
def _descend(
    codes,
    scales,
    zeros,
    gradient,
    residual,
    hessian,
    rows,
    columns,
    first,
    width,
    all_groups,
    groups,
    levels,
    passes,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = row < rows
    k = tl.arange(0, WIDTH)
    inside = there[:, None] & (k < width)[None, :]
    at = (row * columns + first)[:, None] + k[None, :]
    g = tl.arange(0, GROUPS)
    scale_at = (row * all_groups + first // GROUP)[:, None] + g[None, :]
    present = there[:, None] & (g < groups)[None, :]
    scale_of = tl.load(scales + scale_at, present, 1.0)
    zero = tl.load(zeros + (row * all_groups)[:, None] + ((first + k) // GROUP)[None, :], inside, 0).to(tl.float32)
    c = tl.load(codes + at, inside, 0).to(tl.float32) - zero
    slope = tl.load(gradient + (row * width)[:, None] + k[None, :], inside, 0.0)
    error = tl.load(residual + at, inside, 0.0)
    for turn in range(passes * groups):
        group = turn % groups
        start = group * GROUP
        stop = tl.minimum(start + GROUP, width)
        here = ((k >= start) & (k < stop))[None, :]
        scale = tl.sum(tl.where((g == group)[None, :], scale_of, 0.0), 1)
        z = tl.sum(tl.where((k == start)[None, :], zero, 0.0), 1)
        image = tl.zeros((TILE, WIDTH), tl.float32)
        for now in range(start, stop):
            at_now = (k == now)[None, :]
            own = tl.load(hessian + now * width + now)
            line = tl.load(hessian + now * width + k, k < width, 0.0)[None, :]
            old = tl.sum(tl.where(at_now, c, 0.0), 1)
            along = tl.sum(tl.where(at_now, slope, 0.0), 1)
            best = tl.floor(old + tl.div_rn(along, tl.where(own > 0, own * scale, 1.0)) + 0.5)
            best = tl.where(own > 0, tl.minimum(tl.maximum(best, -z), levels - z), old)
            change = (best - old) * scale
            c = tl.where(at_now, best[:, None], c)
            error = tl.where(at_now, error - change[:, None], error)
            slope -= change[:, None] * line
            image += best[:, None] * line
        part = tl.where(here, c, 0.0)
        curvature = tl.sum(part * image, 1)
        gain = tl.sum(part * slope, 1)
        bent = curvature > 0
        new = as_f16(tl.where(bent, scale + tl.div_rn(gain, tl.where(bent, curvature, 1.0)), scale))
        change = new - scale
        better = (new > 0) & (change * (2 * gain - change * curvature) > 0)  # rounded to float16, still better
        change = tl.where(better, change, 0.0)
        error -= change[:, None] * part
        slope -= change[:, None] * image
        scale_of = tl.where((g == group)[None, :], (scale + change)[:, None], scale_of)
    tl.store(codes + at, (c + zero).to(tl.uint8), inside)
    tl.store(residual + at, error, inside)
    tl.store(scales + scale_at, scale_of, present)
