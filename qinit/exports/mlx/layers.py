"""A packed layer as MLX has it: w = scale q + bias for groups of 32, 64 or 128 along the inputs, codes as a
little-endian stream of bits in 32-bit words, scales and biases float16.

The bias is -s z, whose digits float16 may not hold. A group is flipped (qinit/exports/flip.py) where that gives a bias
that it holds: at 2 and 3 bits there always is one, as z or 2^bits - 1 - z is a power of two or 0.
Source: mlx/ops.cpp, affine_quantize and affine_dequantize; held against mx.dequantize in tests/compat/readers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinit.exports.flip import exact_in_half
from qinit.exports.words import flip_words
from qinit.formats.gptq.packing import WORD, unpack_rows
from qinit.grids import Quantized

BITS = (2, 3, 4, 8)
GROUP_SIZES = (128, 64, 32)
PARTS = ("weight", "scales", "biases")


def group_size(bits: int, grouped: int, in_features: int) -> int | None:
    """Return the largest group that MLX has and a layer's groups of `grouped` weights are made of, None where it does
    not hold the layer."""
    if bits not in BITS:
        return None
    whole = (size for size in GROUP_SIZES if grouped % size == 0 and in_features % size == 0)
    return next(whole, None)


@dataclass(frozen=True)
class Biases:
    """Which groups to flip, how many biases float16 rounds, and the worst of them in steps of its grid."""

    flips: torch.Tensor
    rounded: int
    worst: float


def biases_of(grid: Quantized) -> Biases:
    """Choose for each group the side with the smaller error. Codes are not looked at."""
    assert grid.zeros is not None
    zeros = grid.zeros.int()
    plain, turned = (_error(grid.scales * each) for each in (zeros, 2**grid.bits - 1 - zeros))
    error = torch.minimum(plain, turned)
    steps = error / grid.scales.abs().clamp_min(torch.finfo(torch.float32).tiny)
    return Biases(turned < plain, int((error > 0).sum()), float(steps.max()))


def encode(grid: Quantized, qweight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `PARTS` of a grid and its codes as GPTQ packs them, int32 [in bits / 32, out], which are changed: uint32
    [out, in bits / 32], float16 [out, in / group] twice. MLX must hold the layer."""
    assert grid.zeros is not None
    width = len(qweight) * WORD // grid.bits
    size = group_size(grid.bits, grid.group_size, width)
    assert size is not None
    flips = biases_of(grid).flips
    words = flip_words(qweight, flips, grid).T.contiguous()
    repeats = grid.group_size // size
    scales = torch.where(flips, -grid.scales, grid.scales)
    offsets = -scales * torch.where(flips, 2**grid.bits - 1 - grid.zeros, grid.zeros)
    halves = (each.half().repeat_interleave(repeats, dim=1)[:, : width // size] for each in (scales, offsets))
    scales, biases = (each.contiguous() for each in halves)
    return words.view(torch.uint32), scales, biases


def decode(words: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Undo `encode`: the weight [out, in] in float32."""
    codes = unpack_rows(words.view(torch.int32), bits).unflatten(1, (-1, size)).float()
    return (codes * scales.float()[..., None] + biases.float()[..., None]).flatten(1)


def _error(product: torch.Tensor) -> torch.Tensor:
    return torch.where(exact_in_half(product), 0.0, (product.half().float() - product).abs())
