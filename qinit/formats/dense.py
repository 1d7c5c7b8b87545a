"""Dense: Q as ordinary weights in the checkpoint's dtype. Loads everywhere, saves nothing on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qinit.files.tensors import TensorSpec
from qinit.formats.base import Format
from qinit.grids import Grid, Quantized
from qinit.source.targets import Target


class DenseFormat(Format):
    name = "dense"
    title = "ordinary weights"
    mixed_bits = True

    def storage(self, target: Target) -> torch.dtype | None:
        return target.tensor.dtype

    def specs(self, target: Target, bits: int, group_size: int) -> list[TensorSpec]:
        return [TensorSpec(target.tensor.name, target.tensor.dtype, target.tensor.shape)]

    def encode(self, target: Target, quantized: Quantized, grid: Grid) -> dict[str, torch.Tensor]:
        values = grid.dequantize(quantized).to(target.tensor.dtype)
        return {target.tensor.name: values.T.contiguous() if target.module.transposed else values}

    def decode(self, target: Target, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int) -> torch.Tensor:
        values = tensors[target.tensor.name].float()
        return values.T.contiguous() if target.module.transposed else values

    def recognises(self, config: dict[str, Any]) -> bool:
        return config.get("quantization_config") is None
