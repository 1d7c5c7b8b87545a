"""GPTQ (gptq_v2): packed codes that transformers loads through gptqmodel and optimum.

    X.qweight int32 [in*b/32, out]   a little-endian bit stream down each column
    X.qzeros  int32 [in/g, out*b/32] the same along the outputs
    X.scales  f16   [in/g, out]      W[n,k] = scales[k//g, n] * (q[k,n] - z[k//g, n])
    X.g_idx   int32 [in]             k // g

Version 2 stores z itself; version 1 stores z - 1 and spoils its neighbour when z = 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.formats.base import Format
from qinit.formats.gptq.loading import PACKAGES, loader_options
from qinit.formats.gptq.packing import pack_rows, unpack_rows
from qinit.formats.gptq.reading import (
    GRID,
    PARTS,
    VERSION,
    cannot_read,
    dequantized,
    read_codes,
    read_grid,
    read_layer,
    stored_grid,
)
from qinit.formats.gptq.selection import block_to_name, is_reached, is_replaced, packed, selectors
from qinit.formats.reader import method_of
from qinit.grids import Grid, Quantized
from qinit.source.targets import Architecture, LinearModule, Target

WORD = 32
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # what gptqmodel's kernels accept


class GptqFormat(Format):
    name = "gptq"
    title = "GPTQ"
    adapters = ("lora",)
    mixed_bits = False
    mixed_loaders = "qinit.load and GPTQModel.load"
    mixed_note = (
        "packed with mixed widths; load it with qinit.load(DIR) or GPTQModel.load, as stock from_pretrained reads one "
        "width only"
    )
    head_note = "optimum packs the layers of blocks alone, so that transformers starts the head at random"
    holds_experts = False
    experts_note = (
        "format gptq packs linear layers, and transformers has experts as slices of 3-D parameters (GPTQModel.load "
        "alone takes them apart)"
    )
    packages = PACKAGES
    parts = PARTS

    def cannot_hold(self, grid: str, bits: int, group_size: int) -> str | None:
        if grid not in ("int", "sym"):
            return f"holds integer grids only, not '{grid}'; use --format dense"
        if group_size not in GROUP_SIZES:
            return f"needs a group size of {', '.join(map(str, GROUP_SIZES))}, found {group_size}"
        return None

    def cannot_load(self, architecture: Architecture) -> str | None:
        if architecture.main_input == "input_ids":
            return None
        return (
            f"transformers loads GPTQ only for models whose main input is input_ids, and that of "
            f"{architecture.class_name} is {architecture.main_input}"
        )

    def cannot_hold_shape(self, module: LinearModule, group_size: int) -> str | None:
        if module.subclass:
            return f"class {module.subclass} is not nn.Linear itself, and the loader packs no subclass of it"
        if not is_reached(module.name):
            return "the loader finds modules by dir(), which passes over those whose own name begins with a digit"
        if module.set_by_parent:  # transformers 5.23 writes to its `weight` at load, which packed modules lack
            return "transformers sets this weight from its parent module while loading, so it cannot be packed"
        if module.in_features % WORD or module.out_features % WORD:
            return f"{module.out_features} x {module.in_features} is not divisible by {WORD}"
        if module.in_features % group_size:
            return f"{module.in_features} inputs are not divisible by the group size {group_size}"
        return None

    def specs(self, target: Target, bits: int, group_size: int) -> list[TensorSpec]:
        out_features, in_features = target.module.out_features, target.module.in_features
        groups = in_features // group_size
        return [
            TensorSpec(target.prefix + "qweight", torch.int32, (in_features * bits // WORD, out_features)),
            TensorSpec(target.prefix + "qzeros", torch.int32, (groups, out_features * bits // WORD)),
            TensorSpec(target.prefix + "scales", torch.float16, (groups, out_features)),
            TensorSpec(target.prefix + "g_idx", torch.int32, (in_features,)),
        ]

    def encode(self, target: Target, quantized: Quantized, grid: Grid) -> dict[str, torch.Tensor]:
        assert quantized.zeros is not None
        codes, bits = quantized.codes, quantized.bits
        g_idx = _group_indices(codes.shape[1], quantized.group_size)
        return {
            target.prefix + "qweight": pack_rows(codes, bits).T.contiguous(),
            target.prefix + "qzeros": pack_rows(quantized.zeros.T, bits),
            target.prefix + "scales": quantized.scales.T.contiguous().half(),
            target.prefix + "g_idx": g_idx,
        }

    def decode(self, target: Target, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int) -> torch.Tensor:
        return dequantized(*(tensors[target.prefix + part] for part in PARTS), bits=bits)

    def codes(self, target: Target, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int) -> Quantized:
        qweight, qzeros, scales, _ = (tensors[target.prefix + part].cpu() for part in PARTS)
        return Quantized(
            bits,
            group_size,
            unpack_rows(qweight.T.contiguous(), bits),
            scales.T.float().contiguous(),
            unpack_rows(qzeros, bits).T.contiguous(),
        )

    def scales(self, target: Target, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        return {target.prefix + "scales": scales.cpu().T.contiguous().half()}

    def flaws(
        self, target: Target, tensors: Mapping[str, torch.Tensor], group_size: int
    ) -> Iterator[tuple[str, str, str]]:
        name = target.prefix + "g_idx"
        wrong = (tensors[name] != _group_indices(target.module.in_features, group_size)).nonzero()
        if len(wrong):
            k = int(wrong[0])
            yield name, f"{k // group_size} at input {k}", f"{int(tensors[name][k])} ({len(wrong)} such inputs)"
        scales = tensors[target.prefix + "scales"]
        if not_positive := int((scales <= 0).sum()):
            yield target.prefix + "scales", "scales above 0", f"{not_positive} that are not"

    def quantization_config(
        self, grids: dict[str, tuple[int, int]], kept: list[str], modules: Mapping[str, type] = MappingProxyType({})
    ) -> dict[str, Any] | None:
        quantized = list(grids)
        others = {*kept, *(name for name, kind in modules.items() if is_replaced(kind) and name not in grids)}
        counts = Counter(grids.values())
        bits, group_size = most = min(counts, key=lambda grid: (-counts[grid], grid))  # the smallest on a tie
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "sym": False,
            "checkpoint_format": VERSION,
            "pack_dtype": "int32",
            "lm_head": False,
            "backend": "gptq_torch",  # without it a CPU may get a kernel that cannot train
            "modules_in_block_to_quantize": [selectors(quantized, others)],
            "meta": {"quantizer": ["qinit"]},
        }
        block = block_to_name(quantized, modules)
        if block is not None:
            config["block_name_to_quantize"] = block
        # For GPTQModel.load and vLLM, which read this map and not the list above.
        dynamic: dict[str, dict[str, int]] = {f"-:^{re.escape(name)}$": {} for name in kept}
        for name, grid in grids.items():
            if grid != most:
                own = zip(GRID, grid, most, strict=True)
                dynamic[f"+:^{re.escape(name)}$"] = {key: value for key, value, base in own if value != base}
        if dynamic:
            config["dynamic"] = dynamic
        return config

    def replaced(self, config: dict[str, Any], architecture: Architecture) -> set[str]:
        return packed(architecture.classes, config["quantization_config"])

    def recognises(self, config: dict[str, Any]) -> bool:
        return method_of(config) == "gptq"

    def loader_options(self, base: Path, config: dict[str, Any], *, trust_remote_code: bool) -> dict[str, Any]:
        return loader_options(base, config["quantization_config"], trust_remote_code)

    def cannot_read(self, config: dict[str, Any]) -> str | None:
        return cannot_read(config["quantization_config"])

    def grid_of(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]
    ) -> tuple[int, int]:
        return stored_grid(module, parts, config["quantization_config"])

    def read(
        self,
        module: LinearModule,
        parts: Mapping[str, StoredTensor],
        config: dict[str, Any],
        device: torch.device,
    ) -> torch.Tensor:
        return read_layer(module, parts, config["quantization_config"], device)

    def read_codes(self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]) -> Quantized:
        return read_codes(module, parts, config["quantization_config"])

    def read_grid(self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]) -> Quantized:
        return read_grid(module, parts, config["quantization_config"])


def _group_indices(in_features: int, group_size: int) -> torch.Tensor:
    return torch.arange(in_features, dtype=torch.int32) // group_size
