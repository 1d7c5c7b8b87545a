"""GPTQ in its first version, symmetric, for loaders that know nothing else; and in auto-round's own wrapping.

Version 1 stores z - 1 for the zero point z, which spoils its neighbour where z = 0. Here z is half = 2^(bits-1) in all
groups, so that it is right, and is what version 2 says. Tensors are those of `qinit.formats.gptq`.
"""

from __future__ import annotations

from typing import Any

import torch

from qinit.exports.checkpoint import QUANTIZATION, CheckpointExport, Layer, Rounded, left_linear, widths
from qinit.exports.finished import FinishedRun
from qinit.exports.symmetric import half, not_symmetric
from qinit.exports.vllm import vllm_command
from qinit.exports.words import all_words, symmetric_words
from qinit.formats.gptq.selection import shared_block
from qinit.report.report import Report


class GptqExport(CheckpointExport):
    name = "gptq"
    reader = "loaders of GPTQ's first version"

    def cannot_hold(self, run: FinishedRun) -> str | None:
        return not_symmetric(run)

    def parts(self, run: FinishedRun, layer: Layer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {part: (tensor.dtype, tensor.shape) for part, tensor in layer.parts.items()}

    def encode(self, run: FinishedRun, layer: Layer, rounded: Rounded) -> dict[str, torch.Tensor]:
        words = symmetric_words(run, layer)
        groups, outputs = words.scales.shape
        return {
            "qweight": words.codes,
            "qzeros": all_words(half(layer.bits) - 1, groups, outputs, layer.bits),
            "scales": words.scales,
            "g_idx": layer.parts["g_idx"].read(),
        }

    def quantization_config(self, run: FinishedRun, layers: list[Layer]) -> dict[str, Any]:
        return {**run.checkpoint.config[QUANTIZATION], "checkpoint_format": "gptq", "sym": True}

    def load(self, report: Report) -> str:
        return f"With `pip install gptqmodel optimum`:\n\n{super().load(report)}"


class AutoRoundExport(GptqExport):
    """The same without `g_idx`, as auto-round's packing `auto_round:auto_gptq` is (its qlinear_torch_zp.py)."""

    name = "auto-round"
    reader = "SGLang, vLLM and auto-round"

    def parts(self, run: FinishedRun, layer: Layer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {part: kind for part, kind in super().parts(run, layer).items() if part != "g_idx"}

    def encode(self, run: FinishedRun, layer: Layer, rounded: Rounded) -> dict[str, torch.Tensor]:
        return {part: value for part, value in super().encode(run, layer, rounded).items() if part != "g_idx"}

    def quantization_config(self, run: FinishedRun, layers: list[Layer]) -> dict[str, Any]:
        found = widths(layers)
        bits, group_size = most = next(iter(found))
        own: dict[str, dict[str, Any]] = {name: {"bits": 16, "data_type": "float"} for name in left_linear(run, layers)}
        for grid, others in found.items():
            if grid != most:
                own |= {layer.module.name: {"bits": grid[0], "group_size": grid[1]} for layer in others}
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": True,
            "data_type": "int",
            "block_name_to_quantize": shared_block([layer.module.name for layer in layers]),
            "extra_config": own,
        }

    def load(self, report: Report) -> str:
        both = CheckpointExport.load(self, report).replace("; from peft import PeftModel", "")
        base, _, _ = both.partition("\nmodel")
        return f"""\
With vLLM:

{vllm_command(report)}

With transformers (`pip install auto-round`) the base alone, as PEFT has no LoRA for auto-round's layers:

{base}
```"""
