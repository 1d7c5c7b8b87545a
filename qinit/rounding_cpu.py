"""The block steps of `qinit.rounding` as fused CPU kernels (numba); every row is one thread's from start to end."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from qinit.grids.base import Quantized
from qinit.grids.integer_cpu import HALF, TINY, to_f16, use_as_many_threads_as_torch
from qinit.rounding import Block

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
    """As `qinit.rounding.feed_back_block_torch`."""
    assert quantized.zeros is not None
    use_as_many_threads_as_torch()
    _feed_back(
        block.columns.start,
        np.float32(block.levels),
        block.group_size,
        block.ratios.numpy(),
        block.refinements,
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
    block: Block, quantized: Quantized, gradient: torch.Tensor, residual: torch.Tensor, hessian: torch.Tensor
) -> None:
    """As `qinit.rounding.descend_block_torch`."""
    assert quantized.zeros is not None
    use_as_many_threads_as_torch()
    _descend(
        block.columns.start,
        np.float32(block.levels),
        block.group_size,
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
        c = min(max(np.float32(math.floor(x[k] * inverse + HALF)), -z), levels - z)
        xc += h[k] * x[k] * c
        cc += h[k] * c * c
    return xc, cc


@numba.njit(fastmath=True)
def _fit(x, h, n, levels, ratios, refinements):
    low = ZERO
    high = ZERO
    for k in range(n):
        low = min(low, x[k])
        high = max(high, x[k])
    base = (high - low) / levels
    centre = np.float32(math.floor(-low / max(base, TINY) + HALF))
    gain = ZERO
    scale = base
    zero = centre
    if ratios.shape[0] > 1:
        for t in range(ratios.shape[0]):
            inverse = ONE / max(base * ratios[t], TINY)
            for shift in range(-1, 2):
                z = centre + np.float32(shift)
                if z < ZERO or z > levels:
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


@numba.njit(parallel=True, fastmath=True, cache=True)
def _feed_back(
    first, levels, group_size, ratios, refinements, codes, scales, zeros, x, moved, residual, feedback, weights, groups
):
    rows, width = moved.shape
    for i in numba.prange(rows):
        m = moved[i]
        for k in range(width - 1, -1, -1):
            g = groups[k]
            if ratios.shape[0] > 0 and (k == width - 1 or groups[k + 1] != g):
                start = k - (k % group_size)
                scale, zero = _fit(m[start:], weights[start:], k + 1 - start, levels, ratios, refinements)
                scales[i, g] = scale
                zeros[i, g] = np.uint8(zero)
            scale = scales[i, g]
            z = np.float32(zeros[i, g])
            c = min(max(np.float32(math.floor(m[k] / scale + HALF)), -z), levels - z)
            error = x[i, first + k] - scale * c
            codes[i, first + k] = np.uint8(c + z)
            residual[i, first + k] = error
            for j in range(k):
                m[j] += error * feedback[k, j]


@numba.njit(parallel=True, fastmath=True, cache=True)
def _descend(first, levels, group_size, codes, scales, zeros, gradient, residual, hessian):
    rows, width = gradient.shape
    for i in numba.prange(rows):
        slope = gradient[i]
        image = np.empty(width, np.float32)
        for start in range(0, width, group_size):
            stop = min(start + group_size, width)
            g = (first + start) // group_size
            scale = scales[i, g]
            z = np.float32(zeros[i, g])
            for k in range(start, stop):
                curvature = hessian[k, k]
                if not curvature > ZERO:
                    continue
                old = np.float32(codes[i, first + k]) - z
                c = np.float32(math.floor(old + slope[k] / (curvature * scale) + HALF))
                c = min(max(c, -z), levels - z)
                if c != old:
                    change = (c - old) * scale
                    codes[i, first + k] = np.uint8(c + z)
                    residual[i, first + k] -= change
                    for j in range(start, width):  # what lies in front is done with
                        slope[j] -= change * hessian[k, j]
            image[start:] = ZERO
            along = ZERO
            for k in range(start, stop):
                c = np.float32(codes[i, first + k]) - z
                along += c * slope[k]
                if c != ZERO:
                    for j in range(start, width):
                        image[j] += c * hessian[k, j]
            curvature = ZERO
            for k in range(start, stop):
                curvature += (np.float32(codes[i, first + k]) - z) * image[k]
            if curvature > ZERO and scale + along / curvature > ZERO:
                new = to_f16(scale + along / curvature)
                change = new - scale
                if new > ZERO and change * (along + along - change * curvature) > ZERO:  # rounded, still better
                    scales[i, g] = new
                    for k in range(start, stop):
                        residual[i, first + k] -= change * (np.float32(codes[i, first + k]) - z)
                    for j in range(stop, width):
                        slope[j] -= change * image[j]
