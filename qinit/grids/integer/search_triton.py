"""The integer grid's search as one fused GPU kernel (Triton): every group is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qinit.grids.base import Quantized
from qinit.grids.integer.block import room_for
from qinit.grids.integer.triton_steps import fit, on, range_of, rounded

TILE = 2048  # weights that one program holds


def quantize_triton(
    target: torch.Tensor,
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    ratios: torch.Tensor,
    refinements: int,
    previous: Quantized | None,
    zero_range: tuple[int, int],
) -> tuple[Quantized, torch.Tensor]:
    """As `quantize_torch`; the sums of a group are added in another order."""
    rows, columns = weight.shape
    quantized, residual = room_for(weight, bits, group_size, previous)
    groups = quantized.scales.shape[1]
    width = triton.next_power_of_2(group_size)
    tile = max(1, TILE // width)
    with on(weight.device):
        _search[(triton.cdiv(rows * groups, tile),)](
            *(target.contiguous(), weight.contiguous(), ratios.to(weight.device)),
            *(quantized.codes, quantized.scales, quantized.zeros, residual),
            *(rows * groups, columns, groups, float(2**bits - 1), *map(float, zero_range)),
            *(len(ratios) if len(ratios) > 1 else 0, refinements, previous is not None, group_size, width, tile),
        )
    return quantized, residual


@triton.jit
def _search(
    target,
    weight,
    ratios,
    codes,
    scales,
    zeros,
    residual,
    count,
    columns,
    groups,
    levels,
    least,
    most,
    tried,
    REFINEMENTS: tl.constexpr,
    WARM: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # of the group
    there = index < count
    first = index % groups * GROUP
    k = tl.arange(0, WIDTH)
    inside = there[:, None] & (k < GROUP)[None, :] & (first[:, None] + k[None, :] < columns)
    at = (index // groups * columns + first)[:, None] + k[None, :]
    x = tl.load(target + at, inside, 0.0)
    if WARM:
        base = tl.load(scales + index, there, 1.0)
        centre = tl.load(zeros + index, there, 0).to(tl.float32)
    else:
        base, centre = range_of(tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0), levels, least, most)
    ones = tl.full((1, WIDTH), 1.0, tl.float32)
    scale, zero = fit(x, ones, base, centre, ratios, tried, levels, least, most, 1.0, REFINEMENTS)
    c = rounded(x, tl.div_rn(tl.full((TILE,), 1.0, tl.float32), scale), zero, levels)
    tl.store(scales + index, scale, there)
    tl.store(zeros + index, zero.to(tl.uint8), there)
    tl.store(codes + at, (c + zero[:, None]).to(tl.uint8), inside)
    tl.store(residual + at, tl.load(weight + at, inside, 0.0) - scale[:, None] * c, inside)
