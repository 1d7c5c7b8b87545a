"""A group of codes taken from the other end of its grid: s (q - z) = -s ((top - q) - (top - z)), top = 2^bits - 1.

Float arithmetic is symmetric in the sign, so the values are the same to the last bit. What a form has no zero point or
no exact offset for, it may have after that.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qinit.grids import Quantized
from qinit.linalg.chunks import row_chunks


def flipped(quantized: Quantized, groups: torch.Tensor) -> Quantized:
    """Return the same Q with the groups flipped that are True in `groups` [out, groups]: codes, zero points, and the
    scales' sign. What is given is not changed."""
    assert quantized.zeros is not None
    top = 2**quantized.bits - 1
    codes = torch.empty_like(quantized.codes)
    for rows in row_chunks(*quantized.codes.shape):  # top - q is q with all its bits changed
        masks = spread(groups[rows].to(torch.uint8) * top, quantized)
        torch.bitwise_xor(quantized.codes[rows], masks, out=codes[rows])
    scales = torch.where(groups, -quantized.scales, quantized.scales)
    return replace(
        quantized, codes=codes, scales=scales, zeros=torch.where(groups, top - quantized.zeros, quantized.zeros)
    )


def spread(values: torch.Tensor, quantized: Quantized) -> torch.Tensor:
    """Return values of groups [rows, groups] for each code of them [rows, in]."""
    return values.repeat_interleave(quantized.group_size, dim=1)[:, : quantized.codes.shape[1]]


def exact_in_half(product: torch.Tensor) -> torch.Tensor:
    """Return which float32 values float16 holds to the last bit."""
    return product.half().float() == product
