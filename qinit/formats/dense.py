"""Dense: Q as ordinary weights in the checkpoint's dtype. Loads everywhere, saves nothing on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qinit.grids import Grid, Quantized
from qinit.safetensors_io import TensorSpec

if TYPE_CHECKING:
    from qinit.targets import LinearModule, Target


class DenseFormat:
    name = "dense"
    mixed_bits = True

    def cannot_hold(self, grid: str, bits: int, group_size: int) -> str | None:
        return None

    def cannot_hold_shape(self, module: LinearModule, group_size: int) -> str | None:
        return None

    def storage(self, target: Target) -> torch.dtype | None:
        return target.tensor.dtype

    def specs(self, target: Target, bits: int, group_size: int) -> list[TensorSpec]:
        return [TensorSpec(target.tensor.name, target.tensor.dtype, target.tensor.shape)]

    def encode(self, target: Target, quantized: Quantized, grid: Grid) -> dict[str, torch.Tensor]:
        values = grid.dequantize(quantized).to(target.tensor.dtype)
        return {target.tensor.name: values.T.contiguous() if target.module.transposed else values}

    def quantization_config(
        self, bits: int, group_size: int, quantized: list[str], kept: list[str]
    ) -> dict[str, Any] | None:
        return None
