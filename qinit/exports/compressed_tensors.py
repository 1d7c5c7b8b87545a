"""compressed-tensors, pack-quantized: what vLLM and SGLang read, and transformers with the package of that name.

    X.weight_packed int32 [out, in*b/32]   a little-endian bit stream along each row, of q - half + half
    X.weight_scale  f16   [out, in/g]      W[n,k] = weight_scale[n, k//g] * (q[n,k] - half), half = 2^(b-1)
    X.weight_shape  int64 [2]              out, in

Codes follow one another without gaps, across words at 3 bits: so does compressed-tensors from its pull request 732 on
(before, it left 2 bits of each word empty at 3 bits). At 2, 4 and 8 bits both are the same. Asymmetric layers are not
written: transformers 5.23 makes room for zero points that are not packed, and then cannot load packed ones.
"""

from __future__ import annotations

from typing import Any

import torch

from qinit.exports.checkpoint import CheckpointExport, Layer, Rounded, left_linear, widths
from qinit.exports.finished import FinishedRun
from qinit.exports.symmetric import not_symmetric
from qinit.exports.vllm import vllm_command
from qinit.exports.words import symmetric_words
from qinit.formats.compressed_tensors import CompressedTensorsReader
from qinit.formats.gptq.packing import WORD
from qinit.report.report import Report


class CompressedTensorsExport(CheckpointExport):
    name = "compressed-tensors"
    reader = "vLLM, SGLang and transformers"

    def cannot_hold(self, run: FinishedRun) -> str | None:
        if other := next((layer.module.name for layer in self.layout(run) if layer.module.transposed), None):
            return f"compressed-tensors packs nn.Linear alone, and {other} is transformers' Conv1D"
        return not_symmetric(run)

    def parts(self, run: FinishedRun, layer: Layer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, columns = layer.shape
        return {
            "weight_packed": (torch.int32, (rows, columns * layer.bits // WORD)),
            "weight_scale": (torch.float16, (rows, columns // layer.group_size)),
            "weight_shape": (torch.int64, (2,)),
        }

    def encode(self, run: FinishedRun, layer: Layer, rounded: Rounded) -> dict[str, torch.Tensor]:
        words = symmetric_words(run, layer)
        return {
            "weight_packed": words.codes.T.contiguous(),
            "weight_scale": words.scales.T.contiguous(),
            "weight_shape": torch.tensor(layer.shape),
        }

    def quantization_config(self, run: FinishedRun, layers: list[Layer]) -> dict[str, Any]:
        found = widths(layers)
        groups = {}
        for number, ((bits, group_size), own) in enumerate(found.items()):
            weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if len(found) == 1 else [layer.module.name for layer in own],
                "weights": {**weights, "group_size": group_size, "dynamic": False},
                "format": "pack-quantized",
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": left_linear(run, layers),
        }

    def load(self, report: Report) -> str:
        return f"""\
With transformers and PEFT (`pip install compressed-tensors`; the first forward pass unpacks the weights, and PEFT needs
them unpacked):

{_unpacked_first(super().load(report))}
With vLLM:

{vllm_command(report)}

Scales are float16: loaded as float16 or float32 they are the run's, as bfloat16 they are rounded to 8 bits."""


def _unpacked_first(lines: str) -> str:
    """Put the line between the base's and the adapter's that unpacks all layers."""
    base, adapter = lines.split("\nmodel = ")
    base = base.replace('dtype="auto"', 'dtype="float16"')
    return f"{base}\n{CompressedTensorsReader.opening}\nmodel = {adapter}"
