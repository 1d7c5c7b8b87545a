"""The integer grid's search in plain torch: the reference for the kernels, and what a GPU without Triton runs.

Scale search `mse`: for a zero point z and codes c = q - z, the least-squares scale is <x,c>/<c,c> and the
error |x|^2 - <x,c>^2/<c,c>, so a candidate costs one pass over the group and no second one for its scale.
The best of a set of clipping ratios and three zero points is then refined by alternating codes and scale.
"""

from __future__ import annotations

import torch

from qinit.grids.base import Quantized
from qinit.grids.integer.block import room_for
from qinit.grids.integer.candidates import F16_MAX, TINY
from qinit.linalg.chunks import grouped, row_chunks


def quantize_torch(
    target: torch.Tensor,
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    ratios: torch.Tensor,
    refinements: int,
    previous: Quantized | None,
    zero_range: tuple[int, int],
) -> tuple[Quantized, torch.Tensor]:
    """Round `target` [out, in] to the grid; `ratios` clip each group's range, or the scales of `previous`; `zero_range`
    holds the least and the largest zero point."""
    rows, columns = weight.shape
    quantized, residual = room_for(weight, bits, group_size)
    assert quantized.zeros is not None
    for part in row_chunks(rows, columns, device=weight.device):
        x = grouped(target[part], group_size)
        start = None
        if previous is not None:
            assert previous.zeros is not None
            start = (previous.scales[part], previous.zeros[part].float())
        c, z, s = fit_groups(x, 2**bits - 1, ratios.tolist(), refinements, start, zero_range)
        quantized.scales[part], quantized.zeros[part] = s, z.to(torch.uint8)
        quantized.codes[part] = (c + z[..., None]).to(torch.uint8).flatten(1)[:, :columns]
        residual[part] = weight[part] - (c * s[..., None]).flatten(1)[:, :columns]
    return quantized, residual


def fit_groups(
    x: torch.Tensor,
    levels: int,
    ratios: list[float],
    refinements: int,
    start: tuple[torch.Tensor, torch.Tensor] | None,
    zero_range: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit codes c [..., g], zero points z and scales s [...] to groups x [..., g]; `levels` is the top code.

    `start` holds scales and zero points to search around; without it the ratios clip the group's range.
    """
    if start is None:
        base, centre = range_of(x, levels, zero_range)
    else:
        base, centre = start
    scale, zero = base, centre
    if len(ratios) > 1:
        gain = torch.full_like(base, -1.0)
        for ratio in ratios:
            gain, scale, zero = _consider(x, base * ratio, centre, levels, zero_range, gain, scale, zero)
    for _ in range(refinements):
        scale = _refine(x, scale, zero, levels)
    scale = scale.clamp(max=F16_MAX).half().float()
    scale = torch.where(scale > 0, scale, 1.0)
    return _round_to(x, scale, zero, levels), zero, scale


def range_of(x: torch.Tensor, levels: int, zero_range: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales [...] that hold groups x [..., g], and their zero points."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    base = (high - low) / levels
    nearest = torch.floor(-low / base.clamp(min=TINY) + 0.5)
    centre = nearest.clamp(*zero_range)
    wider = torch.maximum(-low / centre.clamp(min=0.5), high / (levels - centre).clamp(min=0.5))
    return torch.where(centre == nearest, base, wider), centre


def _round_to(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int) -> torch.Tensor:
    rounded = torch.floor(x / scale.clamp(min=TINY)[..., None] + 0.5)
    return torch.minimum(torch.maximum(rounded, -zero[..., None]), levels - zero[..., None])


def _consider(
    x: torch.Tensor,
    tried: torch.Tensor,
    centre: torch.Tensor,
    levels: int,
    zero_range: tuple[int, int],
    gain: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Try one scale with three zero points; keep per group what gains most over the error of all zeros."""
    for shift in (-1.0, 0.0, 1.0):
        z = (centre + shift).clamp(*zero_range)
        c = _round_to(x, tried, z, levels)
        xc, cc = (x * c).sum(-1), (c * c).sum(-1).clamp(min=1.0)
        better = xc * xc / cc > gain
        gain = torch.where(better, xc * xc / cc, gain)
        scale = torch.where(better, xc / cc, scale)
        zero = torch.where(better, z, zero)
    return gain, scale, zero


def _refine(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int) -> torch.Tensor:
    """The least-squares scale for the codes that the given scale rounds to."""
    c = _round_to(x, scale, zero, levels)
    cc = (c * c).sum(-1)
    return torch.where(cc > 0, (x * c).sum(-1) / cc.clamp(min=1.0), scale)
