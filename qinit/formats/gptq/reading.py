"""Reads packed GPTQ layers: their tensors, their width, their weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.formats.gptq.packing import unpack_rows
from qinit.grids import Quantized
from qinit.linalg.chunks import row_chunks
from qinit.source.checkpoint import read_finite
from qinit.source.targets import LinearModule

PARTS = ("qweight", "qzeros", "scales", "g_idx")
GRID = ("bits", "group_size")  # what `dynamic` may give a module of its own


def dequantized(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, *, bits: int
) -> torch.Tensor:
    """Return the weight [out, in] that four packed tensors stand for, s (q - z), in float32."""
    zeros, scales, groups = unpack_rows(qzeros, bits).T.float(), scales.T.float(), g_idx.long()
    result = torch.empty((qweight.shape[1], len(groups)), device=qweight.device)
    for rows in row_chunks(*result.shape):
        codes = unpack_rows(qweight[:, rows].T, bits).float()
        torch.mul(codes - zeros[rows][:, groups], scales[rows][:, groups], out=result[rows])
    return result


def grid_of(name: str, quantization: dict[str, Any]) -> tuple[int, int]:
    """Return bits and group size of a packed module, by the rule of gptqmodel: the first pattern of `dynamic` that
    matches the name from its start decides, else the base's."""
    overrides = (quantization.get("dynamic") or {}).items()
    matching = (own for pattern, own in overrides if re.match(pattern.removeprefix("+:").removeprefix("-:"), name))
    own = {**quantization, **next(matching, {})}
    bits, group_size = (int(own[key]) for key in GRID)
    return bits, group_size


def read_layer(
    module: LinearModule, parts: Mapping[str, StoredTensor], quantization: dict[str, Any], device: torch.device
) -> torch.Tensor:
    """Return a layer's weight [out, in] in float32 as gptqmodel's kernel computes with it: rounded to float16.

    Raises CheckpointError for NaN and Inf, and for tensors that are not of the width that `quantization` says.
    """
    _, bits = _grid(module, parts, quantization)
    return dequantized(*(read_finite(parts[part]).to(device) for part in PARTS), bits=bits).half().float()


def read_codes(module: LinearModule, parts: Mapping[str, StoredTensor], quantization: dict[str, Any]) -> Quantized:
    """Return a layer's codes, zero points and scales, on the CPU. Raises CheckpointError as `read_layer` does, and for
    groups that are not runs of inputs (`desc_act`)."""
    grid = read_grid(module, parts, quantization)
    return replace(grid, codes=unpack_rows(read_finite(parts["qweight"]).T.contiguous(), grid.bits))


def read_grid(module: LinearModule, parts: Mapping[str, StoredTensor], quantization: dict[str, Any]) -> Quantized:
    """Return the same with codes [out, 0], which are not read."""
    group_size, bits = _grid(module, parts, quantization)
    qzeros, scales, g_idx = (read_finite(parts[part]) for part in PARTS[1:])
    if not torch.equal(g_idx.int(), torch.arange(module.in_features, dtype=torch.int32) // group_size):
        raise CheckpointError(
            f"{parts['g_idx'].file}: tensor '{parts['g_idx'].name}' orders the inputs of its groups by size "
            "(desc_act), expected groups of inputs that lie side by side"
        )
    codes = torch.empty((module.out_features, 0), dtype=torch.uint8)
    return Quantized(bits, group_size, codes, scales.T.float().contiguous(), unpack_rows(qzeros, bits).T.contiguous())


def _grid(module: LinearModule, parts: Mapping[str, StoredTensor], quantization: dict[str, Any]) -> tuple[int, int]:
    """Return group size and bits of a layer, held against the shape of its codes."""
    (bits, group_size), packed = grid_of(module.name, quantization), parts["qweight"]
    expected = (module.in_features * bits // 32, module.out_features)
    if packed.shape != expected:
        raise CheckpointError(
            f"{packed.file}: tensor '{packed.name}' has shape {list(packed.shape)}, but config.json says "
            f"{bits} bits, so {list(expected)}; config and weights belong to different models"
        )
    return group_size, bits
