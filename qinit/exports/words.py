"""Packed layers that change their form without being unpacked: codes lie as bits in words along the inputs, in GPTQ's
tensors as in those of its kin, and a group is flipped (see `symmetric`) by changing all its bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinit.exports.checkpoint import Layer
from qinit.exports.finished import FinishedRun
from qinit.exports.symmetric import half
from qinit.formats.gptq.packing import WORD, pack_rows
from qinit.grids import Quantized
from qinit.source.checkpoint import read_finite


@dataclass(frozen=True)
class Words:
    """A layer on the symmetric grid: `codes` int32 [in*bits/32, out], little-endian bit streams down the columns, and
    signed float16 `scales` [groups, out]; the zero point is half everywhere."""

    codes: torch.Tensor
    scales: torch.Tensor


def symmetric_words(run: FinishedRun, layer: Layer) -> Words:
    """Read a packed layer; its run must be one that is symmetric (`not_symmetric`). Raises CheckpointError for NaN and
    Inf, and for tensors that do not fit config.json."""
    grid = run.weights.grid(layer.module)
    assert grid is not None
    assert grid.zeros is not None
    flips = torch.ne(grid.zeros, half(grid.bits))
    codes = flip_words(layer.parts["qweight"].read(), flips, grid)
    scales = read_finite(layer.parts["scales"])
    return Words(codes, torch.where(flips.T, -scales, scales))


def flip_words(codes: torch.Tensor, flips: torch.Tensor, grid: Quantized) -> torch.Tensor:
    """Flip in packed codes int32 [in*bits/32, out] the groups that are True in `flips` [out, groups]; returns them."""
    words, more = divmod(grid.group_size * grid.bits, WORD)
    if more:  # groups end within words
        masks = (flips.to(torch.uint8) * (2**grid.bits - 1)).repeat_interleave(grid.group_size, dim=1)
        codes ^= pack_rows(masks[:, : len(codes) * WORD // grid.bits], grid.bits).T
    else:
        for group, flip in enumerate(flips.T.int().neg()):  # -1 has all bits set
            codes[group * words : (group + 1) * words] ^= flip
    return codes


def all_words(value: int, groups: int, count: int, bits: int) -> torch.Tensor:
    """Return zero points that are all the same as GPTQ packs them: int32 [groups, count*bits/32]."""
    return pack_rows(torch.full((1, count), value, dtype=torch.uint8), bits).expand(groups, -1).contiguous()
