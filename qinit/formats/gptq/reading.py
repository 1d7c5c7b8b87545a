"""Reads packed GPTQ layers: their tensors, their width, their weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.formats.gptq.packing import pack_rows, unpack_rows
from qinit.formats.reader import require_shape
from qinit.grids import Quantized
from qinit.linalg.chunks import row_chunks
from qinit.source.checkpoint import read_finite
from qinit.source.targets import LinearModule

PARTS = ("qweight", "qzeros", "scales", "g_idx")
GRID = ("bits", "group_size")  # what `dynamic` may give a module of its own
VERSION, FIRST = "gptq_v2", "gptq"  # the first version stores z - 1
WIDTHS = (2, 3, 4, 8)


def cannot_read(quantization: dict[str, Any]) -> str | None:
    """Return why `read_layer` does not read a base of this `quantization_config`, or None."""
    version = quantization.get("checkpoint_format") or FIRST
    if version not in (VERSION, FIRST) or quantization.get("pack_dtype", "int32") not in ("int32", None):
        return (
            f"gptq as {version} in words of {quantization.get('pack_dtype', 'int32')}, and {FIRST} and {VERSION} in "
            + ("int32 alone are read")
        )
    return None


def dequantized(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, *, bits: int
) -> torch.Tensor:
    """Return the weight [out, in] that four packed tensors stand for, s (q - z), in float32."""
    zeros, scales, groups = unpack_rows(qzeros, bits).T.float(), scales.T.float(), g_idx.long()
    result = torch.empty((qweight.shape[1], len(groups)), device=qweight.device)
    for rows in row_chunks(*result.shape, device=result.device):
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


def stored_grid(
    module: LinearModule, parts: Mapping[str, StoredTensor], quantization: dict[str, Any]
) -> tuple[int, int]:
    """Return bits and group size of a layer. Raises CheckpointError for tensors that are not of the width and the
    groups that `quantization` says."""
    try:
        bits, group_size = grid_of(module.name, quantization)
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(
            f"{parts['qweight'].file.parent / 'config.json'}: its quantization_config gives no bits and group size "
            f"({type(error).__name__}: {error})"
        ) from None
    outputs, inputs = module.out_features, module.in_features
    group_size = inputs if group_size < 1 else group_size
    if bits not in WIDTHS:
        raise CheckpointError(f"{module.name}: gptq of {bits} bits; {', '.join(map(str, WIDTHS))} are read")
    packed, groups = parts["qweight"], -(-inputs // group_size)
    expected = (inputs * bits // 32, outputs)
    if packed.shape != expected:
        raise CheckpointError(
            f"{packed.file}: tensor '{packed.name}' has shape {list(packed.shape)}, but config.json says "
            f"{bits} bits, so {list(expected)}; config and weights belong to different models"
        )
    require_shape(parts["qzeros"], (groups, outputs * bits // 32))
    require_shape(parts["scales"], (groups, outputs))
    require_shape(parts["g_idx"], (inputs,))
    return bits, group_size


def read_layer(
    module: LinearModule, parts: Mapping[str, StoredTensor], quantization: dict[str, Any], device: torch.device
) -> torch.Tensor:
    """Return a layer's weight [out, in] in float32 as gptqmodel's kernel computes with it: rounded to float16.

    Raises CheckpointError for NaN and Inf, and for tensors that are not of the width that `quantization` says.
    """
    bits, _ = stored_grid(module, parts, quantization)
    qweight, scales, g_idx = (read_finite(parts[part], device) for part in ("qweight", "scales", "g_idx"))
    qzeros = _zeros(parts, quantization, bits).to(device)
    return dequantized(qweight, qzeros, scales, g_idx, bits=bits).half().float()


def read_codes(module: LinearModule, parts: Mapping[str, StoredTensor], quantization: dict[str, Any]) -> Quantized:
    """Return a layer's codes, zero points and scales, on the CPU. Raises CheckpointError as `read_layer` does, and for
    groups that are not runs of inputs (`desc_act`)."""
    grid = read_grid(module, parts, quantization)
    return replace(grid, codes=unpack_rows(read_finite(parts["qweight"]).T.contiguous(), grid.bits))


def read_grid(module: LinearModule, parts: Mapping[str, StoredTensor], quantization: dict[str, Any]) -> Quantized:
    """Return the same with codes [out, 0], which are not read."""
    bits, group_size = stored_grid(module, parts, quantization)
    scales, g_idx = (read_finite(parts[part]) for part in ("scales", "g_idx"))
    if not torch.equal(g_idx.int(), torch.arange(module.in_features, dtype=torch.int32) // group_size):
        raise CheckpointError(
            f"{parts['g_idx'].file}: tensor '{parts['g_idx'].name}' orders the inputs of its groups by size "
            "(desc_act), expected groups of inputs that lie side by side"
        )
    zeros = unpack_rows(_zeros(parts, quantization, bits), bits).T.contiguous()
    codes = torch.empty((module.out_features, 0), dtype=torch.uint8)
    return Quantized(bits, group_size, codes, scales.T.float().contiguous(), zeros)


def _zeros(parts: Mapping[str, StoredTensor], quantization: dict[str, Any], bits: int) -> torch.Tensor:
    """Return the packed zero points as the second version has them."""
    qzeros = read_finite(parts["qzeros"])
    return qzeros if quantization.get("checkpoint_format") == VERSION else of_first_version(qzeros, bits)


def of_first_version(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the packed zero points of a first version as those of the second: one more each. As gptqmodel computes it,
    by adding to whole words, so that where z was 0 its neighbour is spoilt here too; 3-bit ones cross words, and each
    wraps for itself."""
    if bits == 3:
        return pack_rows((unpack_rows(qzeros, bits) + 1) & 7, bits)
    ones = sum(1 << place for place in range(0, 32, bits))
    return (qzeros.long() + ones).to(torch.int32)  # wraps, as there
