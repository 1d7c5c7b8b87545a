"""What the GPU kernels of the integer grid share: the search of a group's scale, and how a tile of rows is launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl

TINY = tl.constexpr(1e-30)
F16_MAX = tl.constexpr(65504.0)


@triton.jit
def range_of(low, high, levels, least, most):
    """Return the scale that holds a group from `low` to `high`, and its zero point."""
    base = tl.div_rn(high - low, levels + tl.zeros_like(high))
    nearest = tl.floor(tl.div_rn(-low, tl.maximum(base, TINY)) + 0.5)
    centre = tl.minimum(tl.maximum(nearest, least), most)
    below = tl.div_rn(-low, tl.maximum(centre, 0.5))
    above = tl.div_rn(high, tl.maximum(levels - centre, 0.5))
    return tl.where(centre == nearest, base, tl.maximum(below, above)), centre


@triton.jit
def rounded(x, inverse, zero, levels):
    """Round x [rows, n] to codes less their zero point, for scales 1 / inverse [rows]."""
    nearest = tl.floor(x * inverse[:, None] + 0.5)
    return tl.minimum(tl.maximum(nearest, -zero[:, None]), levels - zero[:, None])


@triton.jit
def sums(x, weights, inverse, zero, levels):
    """Return <x, c> and <c, c> under the columns' weights for the codes that a scale rounds to."""
    c = rounded(x, inverse, zero, levels)
    return tl.sum(weights * x * c, 1), tl.sum(weights * c * c, 1)


@triton.jit
def fit(x, weights, base, centre, ratios, count, levels, least, most, FLOOR: tl.constexpr, REFINEMENTS: tl.constexpr):
    """Return the scales and zero points [rows] of groups x [rows, n], zeros where there is no column.

    Tries `count` ratios of `base` with three zero points about `centre`, then refines the best by least squares.
    <c, c> counts as FLOOR at least.
    """
    scale, zero, gain = base, centre, tl.zeros_like(base)
    for t in range(count):
        inverse = tl.div_rn(1.0 + tl.zeros_like(base), tl.maximum(base * tl.load(ratios + t), TINY))
        for shift in tl.static_range(3):
            tried = centre + (shift - 1.0)
            xc, cc = sums(x, weights, inverse, tried, levels)
            cc = tl.maximum(cc, FLOOR)
            better = (tried >= least) & (tried <= most) & (cc > 0) & (xc * xc > gain * cc)
            best = tl.div_rn(xc, tl.where(better, cc, 1.0))
            gain = tl.where(better, xc * best, gain)
            scale = tl.where(better, best, scale)
            zero = tl.where(better, tried, zero)
    for _ in tl.static_range(REFINEMENTS):
        inverse = tl.div_rn(1.0 + tl.zeros_like(scale), tl.maximum(scale, TINY))
        xc, cc = sums(x, weights, inverse, zero, levels)
        scale = tl.where(cc > 0, tl.div_rn(xc, tl.where(cc > 0, cc, 1.0)), scale)
    scale = as_f16(scale)
    return tl.where(scale > 0, scale, 1.0), zero


@triton.jit
def as_f16(scale):
    return tl.minimum(scale, F16_MAX).to(tl.float16).to(tl.float32)


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Launch on this device, which need not be the current one."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield
