"""The block steps of rounding under H as fused CPU kernels (numba); every row is one thread's from start to end."""

from __future__ import annotations

from functools import partial

import numba
import numpy as np
import torch

from qinit.grids.base import Quantized
from qinit.grids.integer.block import Block
from qinit.grids.integer.compiled import compiled
from qinit.grids.integer.search_cpu import HALF, TINY, range_of, to_f16, use_as_many_threads_as_torch

ZERO = np.float32(0.0)
ONE = np.float32(1.0)


def feed_back_block(
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
    assert quantized.zeros is not None
    use_as_many_threads_as_torch()
    _feed_back(
        block.columns.start,
        np.float32(block.levels),
        block.group_size,
        block.ratios.numpy(),
        block.refinements,
        np.float32(block.zero_range[0]),
        np.float32(block.zero_range[1]),
        quantized.codes.numpy(),
        quantized.scales.numpy(),
        quantized.zeros.numpy(),
        x.numpy(),
        moved.numpy(),
        residual.numpy(),
        feedback.numpy(),
        weights.contiguous().numpy(),
        group_of.numpy(),
    )


def descend_block(
    block: Block,
    quantized: Quantized,
    gradient: torch.Tensor,
    residual: torch.Tensor,
    hessian: torch.Tensor,
    passes: int,
) -> None:
    """As `qinit.grids.integer.rounding_torch.descend_block_torch`."""
    assert quantized.zeros is not None
    use_as_many_threads_as_torch()
    _descend(
        block.columns.start,
        np.float32(block.levels),
        block.group_size,
        passes,
        quantized.codes.numpy(),
        quantized.scales.numpy(),
        quantized.zeros.numpy(),
        gradient.numpy(),
        residual.numpy(),
        hessian.numpy(),
    )


@numba.njit(fastmath=True, inline="always")
def _sums(x, h, n, inverse, z, levels):
    xc = ZERO
    cc = ZERO
    for k in range(n):
        c = min(max(np.floor(x[k] * inverse + HALF), -z), levels - z)
        xc += h[k] * x[k] * c
        cc += h[k] * c * c
    return xc, cc


@numba.njit(fastmath=True)
def _fit(x, h, n, levels, ratios, refinements, least, most):
    low = ZERO
    high = ZERO
    for k in range(n):
        low = min(low, x[k])
        high = max(high, x[k])
    base, centre = range_of(low, high, levels, least, most)
    gain = ZERO
    scale = base
    zero = centre
    if ratios.shape[0] > 1:
        for t in range(ratios.shape[0]):
            inverse = ONE / max(base * ratios[t], TINY)
            for shift in range(-1, 2):
                z = centre + np.float32(shift)
                if z < least or z > most:
                    continue
                xc, cc = _sums(x, h, n, inverse, z, levels)
                if cc > ZERO and xc > ZERO and xc * xc > gain * cc:
                    gain = xc * xc / cc
                    scale = xc / cc
                    zero = z
    for _ in range(refinements):
        xc, cc = _sums(x, h, n, ONE / max(scale, TINY), zero, levels)
        if cc > ZERO:
            scale = xc / cc
    scale = to_f16(scale)
    if not scale > ZERO:
        scale = ONE
    return scale, zero


@partial(compiled, parallel=True, fastmath=True)
def _feed_back(
    first,
    levels,
    group_size,
    ratios,
    refinements,
    least,
    most,
    codes,
    scales,
    zeros,
    x,
    moved,
    residual,
    feedback,
    weights,
    groups,
):
    rows, width = moved.shape
    for i in numba.prange(rows):
        m = moved[i]
        for k in range(width - 1, -1, -1):
            g = groups[k]
            if ratios.shape[0] > 0 and (k == width - 1 or groups[k + 1] != g):
                start = k - (k % group_size)
                scale, zero = _fit(m[start:], weights[start:], k + 1 - start, levels, ratios, refinements, least, most)
                scales[i, g] = scale
                zeros[i, g] = np.uint8(zero)
            scale = scales[i, g]
            z = np.float32(zeros[i, g])
            c = min(max(np.floor(m[k] / scale + HALF), -z), levels - z)
            error = x[i, first + k] - scale * c
            codes[i, first + k] = np.uint8(c + z)
            residual[i, first + k] = error
            for j in range(k):
                m[j] += error * feedback[k, j]


@numba.njit(fastmath=True, inline="always")
def _image(codes, z, hessian, image):
    """Write codes @ hessian, four rows at a time; the codes are behind an offset of z."""
    n, width = hessian.shape
    for j in range(width):
        image[j] = ZERO
    for k in range(0, n - 3, 4):
        c0 = np.float32(codes[k]) - z
        c1 = np.float32(codes[k + 1]) - z
        c2 = np.float32(codes[k + 2]) - z
        c3 = np.float32(codes[k + 3]) - z
        for j in range(width):
            image[j] += c0 * hessian[k, j] + c1 * hessian[k + 1, j] + c2 * hessian[k + 2, j] + c3 * hessian[k + 3, j]
    for k in range(n - n % 4, n):
        c = np.float32(codes[k]) - z
        for j in range(width):
            image[j] += c * hessian[k, j]


@partial(compiled, parallel=True, fastmath=True)
def _descend(first, levels, group_size, passes, codes, scales, zeros, gradient, residual, hessian):
    rows, width = gradient.shape
    inverse = np.empty(width, np.float32)
    for k in range(width):
        inverse[k] = ONE / hessian[k, k] if hessian[k, k] > ZERO else ZERO
    groups = (width + group_size - 1) // group_size
    for i in numba.prange(rows):
        slope = gradient[i]
        images = np.empty((groups, width), np.float32)  # of each group's codes under H, without the scale
        for group in range(groups):
            part = slice(group * group_size, min((group + 1) * group_size, width))
            z = np.float32(zeros[i, first // group_size + group])
            _image(codes[i, first + part.start : first + part.stop], z, hessian[part], images[group])
        for turn in range(passes * groups):
            image = images[turn % groups]
            g = first // group_size + turn % groups
            start = turn % groups * group_size
            stop = min(start + group_size, width)
            scale = scales[i, g]
            upscale = ONE / scale
            z = np.float32(zeros[i, g])
            along = ZERO
            curvature = ZERO
            for k in range(start, stop):
                old = np.float32(codes[i, first + k]) - z
                c = np.floor(old + slope[k] * inverse[k] * upscale + HALF)
                c = min(max(c, -z), levels - z)
                if c != old:
                    change = c - old
                    codes[i, first + k] = np.uint8(c + z)
                    residual[i, first + k] -= change * scale
                    for j in range(width):
                        slope[j] -= change * scale * hessian[k, j]
                        image[j] += change * hessian[k, j]
            for k in range(start, stop):
                c = np.float32(codes[i, first + k]) - z
                along += c * slope[k]
                curvature += c * image[k]
            if curvature > ZERO and scale + along / curvature > ZERO:
                new = to_f16(scale + along / curvature)
                change = new - scale
                if new > ZERO and change * (along + along - change * curvature) > ZERO:  # rounded, still better
                    scales[i, g] = new
                    for k in range(start, stop):
                        residual[i, first + k] -= change * (np.float32(codes[i, first + k]) - z)
                    for j in range(width):
                        slope[j] -= change * image[j]
