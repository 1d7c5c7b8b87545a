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
        return [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in target.tensors]

    def encode(self, target: Target, quantized: Quantized, grid: Grid) -> dict[str, torch.Tensor]:
        values = grid.dequantize(quantized).to(target.tensor.dtype)
        values = values.T.contiguous() if target.module.transposed else values
        side = target.outputs_side
        parts = values.split([tensor.shape[side] for tensor in target.tensors], dim=side)
        return {tensor.name: part.contiguous() for tensor, part in zip(target.tensors, parts, strict=True)}

    def decode(self, target: Target, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int) -> torch.Tensor:
        values = torch.cat([tensors[tensor.name].float() for tensor in target.tensors], dim=target.outputs_side)
        return values.T.contiguous() if target.module.transposed else values

    def recognises(self, config: dict[str, Any]) -> bool:
        return config.get("quantization_config") is None
