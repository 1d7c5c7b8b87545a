"""An export for mlx-lm, read back."""

from __future__ import annotations

from pathlib import Path

import torch

from qinit.adapters import CONFIG_NAME
from qinit.errors import CheckpointError
from qinit.exports.mlx.layers import PARTS, decode
from qinit.exports.reread import Reread
from qinit.files.tensors import read_header
from qinit.source.checkpoint import Checkpoint, read_finite, read_json


class RereadMlx(Reread):
    def __init__(self, directory: Path, adapter: Path) -> None:
        checkpoint = Checkpoint.open(directory, quantized=True)
        self.base, self.directory = checkpoint.tensors, directory
        self.widths = checkpoint.config.get("quantization") or {}
        there = adapter.is_dir()
        self.factors = read_header(adapter / "adapters.safetensors") if there else {}
        settings = read_json(adapter / CONFIG_NAME, "the export is incomplete") if there else {}
        self.scale = float((settings.get("lora_parameters") or {}).get("scale", 1.0))
        self.tensors = {**self.base, **self.factors}

    def value(self, parameter: str) -> torch.Tensor | None:
        stem = parameter.removesuffix("weight")
        if (stored := self.base.get(parameter)) is None:
            return None
        if f"{stem}{PARTS[1]}" not in self.base:
            return read_finite(stored).float()
        try:
            own = self.widths.get(stem.removesuffix(".")) or self.widths
            words, scales, biases = (self.base[stem + part].read() for part in PARTS)
            return decode(words, scales, biases, int(own["bits"]), int(own["group_size"]))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = f"tensor '{parameter}' and its scales are not of the width that config.json says"
            raise CheckpointError(f"{stored.file}: {what} ({error})") from None

    def change(self, module: str) -> torch.Tensor | None:
        a, b = (self.factors.get(f"{module}.lora_{side}") for side in "ab")
        return None if a is None or b is None else self.scale * (a.read() @ b.read()).T
