"""Bases as other programs write them: layers rounded to the nearest and packed by hand, byte by byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qinit.formats.bitsandbytes import NF4, STATE
from qinit.formats.gptq.packing import pack_rows
from tests.helpers import edit_config, edit_tensors

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]  # the parts of a layer, and the weight that they stand for
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def rounded(
    weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round W [out, in] to the nearest: codes [out, in], scales and zero points [out, groups], no zero point 0."""
    groups, top = weight.float().unflatten(1, (-1, group_size)), 2**bits - 1
    if symmetric:
        scales = groups.abs().amax(-1) / 2 ** (bits - 1)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / top
        zeros = (-low / scales).round().clamp(1, top)
    scales = scales.half().float()
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, top)
    return codes.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8)


def values_of(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return (codes.float() - zeros.float()[:, groups]) * scales[:, groups]


def gptq(weight: torch.Tensor, bits: int = 4, group_size: int = 32, *, version: int = 1) -> Packed:
    codes, scales, zeros = rounded(weight, bits, group_size)
    groups = torch.arange(weight.shape[1]) // group_size
    parts = {
        "qweight": pack_rows(codes, bits).T.contiguous(),
        "qzeros": pack_rows(zeros.T.contiguous() - int(version == 1), bits),
        "scales": scales.T.contiguous().half(),
        "g_idx": groups.int(),
    }
    return parts, values_of(codes, scales, zeros, groups).half().float()


def awq(weight: torch.Tensor, group_size: int = 32) -> Packed:
    codes, scales, zeros = rounded(weight, 4, group_size)
    order = [8 * word + place for word in range(len(weight) // 8) for place in AWQ_ORDER]
    parts = {
        "qweight": pack_rows(codes.T[:, order].contiguous(), 4),
        "qzeros": pack_rows(zeros.T[:, order].contiguous(), 4),
        "scales": scales.T.contiguous().half(),
    }
    return parts, values_of(codes, scales, zeros, torch.arange(weight.shape[1]) // group_size).half().float()


def compressed(weight: torch.Tensor, bits: int = 4, group_size: int = 32, *, symmetric: bool = True) -> Packed:
    codes, scales, zeros = rounded(weight, bits, group_size, symmetric=symmetric)
    scales = scales.bfloat16()
    parts = {
        "weight_packed": pack_rows(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack_rows(zeros.T.contiguous(), bits).T.contiguous()
    groups = torch.arange(weight.shape[1]) // group_size
    return parts, values_of(codes, scales.float(), zeros, groups).bfloat16().float()


def nf4(weight: torch.Tensor, block: int = 64, *, dtype: str = "bfloat16") -> Packed:
    levels, blocks = torch.tensor(NF4), weight.float().reshape(-1, block)
    absmax = blocks.abs().amax(1)
    codes = (blocks / absmax[:, None]).flatten()[:, None].sub(levels).abs().argmin(1).to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": dtype, "shape": list(weight.shape)}
    parts = {
        "weight": ((codes[::2] << 4) | codes[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": levels,
        STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    values = levels[codes.int()] * absmax.repeat_interleave(block)
    return parts, values.to(getattr(torch, dtype)).float().reshape(weight.shape)


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {**GPTQ_CONFIG, "checkpoint_format": "gptq", "backend": "gptq_torch"},
    "gptq_v2": {**GPTQ_CONFIG, "checkpoint_format": "gptq_v2", "backend": "gptq_torch"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "bitsandbytes": {
        **{"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        **{"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"},
        "llm_int8_skip_modules": ["lm_head"],
    },
    "compressed-tensors": {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
    },
}
PACKERS: dict[str, Callable[[torch.Tensor], Packed]] = {
    "gptq": gptq,
    "gptq_v2": lambda weight: gptq(weight, version=2),
    "awq": awq,
    "bitsandbytes": nf4,
    "compressed-tensors": compressed,
}


def packed_base(
    source: Path,
    directory: Path,
    form: str,
    keep: Callable[[str], bool] = lambda name: False,
    kinds: tuple[str, ...] = ("_proj.weight",),
    **config: Any,
) -> Path:
    """Copy a checkpoint in one file and pack the layers whose names end so, by default the linear ones of its blocks,
    all but those to `keep`; `dense` rounds them and packs nothing."""
    shutil.copytree(source, directory)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(kinds) and not keep(name)]:
            weight = tensors.pop(name)
            parts, values = PACKERS.get(form, gptq)(weight.float())
            parts = {"weight": values.to(weight.dtype)} if form == "dense" else parts
            tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}

    edit_tensors(directory / "model.safetensors", pack)
    if form != "dense":
        edit_config(directory, quantization_config={**CONFIGS[form], **config})
    return directory
