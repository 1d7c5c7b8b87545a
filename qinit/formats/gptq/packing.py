"""Bit packing: unsigned integers of b bits as a little-endian stream in 32-bit words."""

from __future__ import annotations

import torch

from qinit.linalg.chunks import row_chunks

WORD = 32


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 [rows, n], n divisible by 32, into int32 [rows, n*bits/32]. Values may cross words (3 bits)."""
    rows, count = codes.shape
    if count % WORD:
        raise ValueError(f"cannot pack {count} values: not divisible by {WORD}")
    packed = torch.empty((rows, count * bits // WORD), dtype=torch.int32, device=codes.device)
    for part in row_chunks(rows, count, device=codes.device):
        values = codes[part].reshape(-1, count // WORD, WORD)
        words = torch.zeros((*values.shape[:2], bits), dtype=torch.int64, device=codes.device)
        for i in range(WORD):
            word, offset = divmod(i * bits, WORD)
            value = values[..., i].long()
            words[..., word] |= (value << offset) & 0xFFFFFFFF
            if offset + bits > WORD:
                words[..., word + 1] |= value >> (WORD - offset)
        packed[part] = words.flatten(1).to(torch.int32)  # wraps above 2^31, as the format wants
    return packed


def unpack_rows(packed: torch.Tensor, bits: int, count: int | None = None) -> torch.Tensor:
    """Undo `pack_rows`: int32 [rows, n*bits/32] into uint8 [rows, n]; or into the first `count` of a stream that ends
    within a word."""
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)) if count is not None else packed
    words = packed.long().bitwise_and(0xFFFFFFFF).reshape(packed.shape[0], -1, bits)
    values = torch.empty((*words.shape[:2], WORD), dtype=torch.uint8, device=packed.device)
    for i in range(WORD):
        word, offset = divmod(i * bits, WORD)
        value = words[..., word] >> offset
        if offset + bits > WORD:
            value |= words[..., word + 1] << (WORD - offset)
        values[..., i] = (value & (2**bits - 1)).to(torch.uint8)
    return values.flatten(1)[:, :count]
