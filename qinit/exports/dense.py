"""Dense: Q as ordinary weights in the type of the rest of the model, with the adapter beside it as PEFT loads it."""

from __future__ import annotations

from collections import Counter

import torch

from qinit.exports.checkpoint import CheckpointExport, Layer, Rounded
from qinit.exports.finished import FinishedRun

CPU = torch.device("cpu")


class DenseExport(CheckpointExport):
    name = "dense"
    reader = "transformers"

    def loses(self, run: FinishedRun) -> str | None:
        dtype = _dtype(run)
        if not run.weights.packed() or dtype in (torch.float16, torch.float32):
            return None
        return f"packed weights have float16's digits, and become {str(dtype).removeprefix('torch.')}, as the rest is"

    def parts(self, run: FinishedRun, layer: Layer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"weight": (_dtype(run), layer.shape[::-1] if layer.module.transposed else layer.shape)}

    def encode(self, run: FinishedRun, layer: Layer, rounded: Rounded) -> dict[str, torch.Tensor]:
        value = run.weights.read(f"{layer.module.name}.weight", CPU)
        assert value is not None
        return {"weight": value.to(_dtype(run))}


def _dtype(run: FinishedRun) -> torch.dtype:
    """Return the type that most of the model's other numbers have."""
    counts: Counter[torch.dtype] = Counter()
    packed = {part.name for parts in run.weights.packed().values() for part in parts.values()}
    for name, tensor in run.checkpoint.tensors.items():
        if name not in packed and tensor.dtype.is_floating_point:
            counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0] if counts else torch.float16
