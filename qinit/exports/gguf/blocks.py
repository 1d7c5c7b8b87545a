"""llama.cpp's types for integer codes: the smallest one that holds a layer to the last bit, and the layer's bytes.

A row is cut into blocks of 32 or 64 weights. All but Q4_1 store w = d v with float16 d and v in [low, high], as
v - low; Q4_1 stores w = d q + m with float16 d and m. A group whose v = q - z do not fit is flipped
(qinit/exports/flip.py): llama.cpp takes a negative d. Sources: ggml-common.h for the layouts, ggml-quants.c for
dequantize_row_*, ggml.h for the numbers; another project gives Q2_0's number to blocks of 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qinit.exports.flip import exact_in_half, flipped, spread
from qinit.exports.words import flip_words
from qinit.grids import Quantized
from qinit.linalg.chunks import row_chunks


@dataclass(frozen=True)
class BlockType:
    """A type: its number in ggml, the file type of a model that is mostly of it, the weights and bytes of a block, and
    how codes [blocks, size] are packed and unpacked. `low` and `high` bound v; None where there is an m."""

    name: str
    number: int
    file_type: int
    size: int
    nbytes: int
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]
    low: int | None = None
    high: int = 0
    stream: int = 0  # the width of codes that stand in the order of GPTQ's words, 0 where the order is another

    def flips(self, grid: Quantized) -> torch.Tensor | None:
        """Return which groups have to be flipped so that this type holds them to the last bit; None if it does not hold
        all. Codes are not looked at."""
        assert grid.zeros is not None
        top = 2**grid.bits - 1
        zeros = grid.zeros.int()
        if self.low is None:
            if top > 15:
                return None
            fits, turned = (exact_in_half(grid.scales * each) for each in (zeros, top - zeros))
        else:
            fits = (-zeros >= self.low) & (top - zeros <= self.high)
            turned = (zeros - top >= self.low) & (zeros <= self.high)
        return ~fits if bool((fits | turned).all()) else None

    def row_bytes(self, in_features: int) -> int:
        return in_features // self.size * self.nbytes

    def encode(self, quantized: Quantized) -> torch.Tensor:
        """Return a layer's bytes, uint8 [out, row_bytes]. It must hold the layer."""
        flips = self.flips(quantized)
        assert flips is not None
        quantized = flipped(quantized, flips)
        assert quantized.zeros is not None
        rows, width = quantized.codes.shape
        heads = [quantized.scales]
        if self.low is None:
            heads.append(-quantized.scales * quantized.zeros)
        packed = self._with_heads(heads, rows, width, quantized.group_size)
        for part in row_chunks(rows, width):
            codes = quantized.codes[part]
            if self.low is not None:  # uint8 wraps around
                codes = codes + spread(-self.low - quantized.zeros[part], quantized)
            packed[part, :, 2 * len(heads) :] = self.pack(codes.reshape(len(codes), -1, self.size))
        return packed.flatten(1)

    def encode_words(self, grid: Quantized, qweight: torch.Tensor) -> torch.Tensor:
        """Return the same of a grid and its codes as GPTQ packs them, int32 [in bits / 32, out], which are changed. The
        codes must be of the width that stands in their order: z is -low in all groups once they are flipped."""
        flips = self.flips(grid)
        assert flips is not None
        words = flip_words(qweight, flips, grid).T.contiguous().view(torch.uint8)
        rows, width = len(words), words.shape[1] * 8 // grid.bits
        packed = self._with_heads([torch.where(flips, -grid.scales, grid.scales)], rows, width, grid.group_size)
        blocks = words.unflatten(1, (-1, self.nbytes - 2))
        packed[..., 2:] = _signed(blocks) if self.pack is _signed else blocks
        return packed.flatten(1)

    def _with_heads(self, heads: list[torch.Tensor], rows: int, width: int, group_size: int) -> torch.Tensor:
        """Return blocks [rows, width / size, nbytes] with what each begins with, given by groups; the rest is empty."""
        packed = torch.empty((rows, width // self.size, self.nbytes), dtype=torch.uint8)
        for i, head in enumerate(heads):
            halves = head.half().repeat_interleave(group_size // self.size, dim=1)[:, : width // self.size]
            packed[..., 2 * i : 2 * i + 2] = halves.unsqueeze(-1).view(torch.uint8)
        return packed

    def decode(self, raw: torch.Tensor) -> torch.Tensor:
        """Return the weight in float32 that bytes, uint8 [out, row_bytes], stand for."""
        blocks = raw.unflatten(1, (-1, self.nbytes))
        first = 2 if self.low is not None else 4
        heads = blocks[..., :first].contiguous().view(torch.float16).float()
        codes = self.unpack(blocks[..., first:]).float()
        if self.low is not None:
            return (heads * (codes + self.low)).flatten(1)
        return (heads[..., :1] * codes + heads[..., 1:]).flatten(1)


def _quarters(codes: torch.Tensor) -> torch.Tensor:
    """Four neighbours to a byte, the first in the lowest bits."""
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    return a | b << 2 | c << 4 | d << 6


def _from_quarters(packed: torch.Tensor) -> torch.Tensor:
    return (packed.unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3).flatten(-2)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The first half of a block in the low nibbles, the second in the high ones."""
    low, high = codes.unflatten(-1, (2, -1)).unbind(-2)
    return low | high << 4


def _from_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _nibbles_and_fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """The fifth bits of a block as 32 bits, little-endian, before the nibbles of the others."""
    bits = (codes >> 4).unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)
    return torch.cat([bits.sum(-1, dtype=torch.uint8), _nibbles(codes & 15)], dim=-1)


def _from_nibbles_and_fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    bits = (packed[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
    return _from_nibbles(packed[..., 4:]) | bits << 4


def _signed(codes: torch.Tensor) -> torch.Tensor:
    return codes ^ 128  # v + 128 as the byte of int8 v


# By their size for a layer: 2.25, 4.5, 5, 5.5 and 8.5 bits to a weight.
BLOCK_TYPES = (
    BlockType("Q2_0", 42, 41, 64, 18, _quarters, _from_quarters, -1, 2, stream=2),
    BlockType("Q4_0", 2, 2, 32, 18, _nibbles, _from_nibbles, -8, 7),
    BlockType("Q4_1", 3, 3, 32, 20, _nibbles, _from_nibbles),
    BlockType("Q5_0", 6, 8, 32, 22, _nibbles_and_fifth_bits, _from_nibbles_and_fifth_bits, -16, 15),
    BlockType("Q8_0", 8, 7, 32, 34, _signed, _signed, -128, 127, stream=8),
)


def smallest(grid: Quantized, in_features: int) -> BlockType | None:
    """Return the smallest type that holds a layer of this grid to the last bit, None if there is none. Codes are not
    looked at."""
    for each in BLOCK_TYPES:
        whole = grid.group_size % each.size == 0 and in_features % each.size == 0
        if whole and each.flips(grid) is not None:
            return each
    return None
