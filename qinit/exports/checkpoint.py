"""Exports that are checkpoints of transformers' own: quantized layers as other tensors, all else as it is, with the
adapter beside it as PEFT loads it."""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qinit.adapters import ADAPTER_DIRECTORY, WEIGHTS_STEM, write_config
from qinit.exports.base import Export
from qinit.exports.finished import FinishedRun
from qinit.exports.reread import Reread, RereadCheckpoint
from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.files.writer import SafetensorsWriter
from qinit.report.card import load_snippet
from qinit.report.report import Report
from qinit.source.targets import LinearModule

QUANTIZATION = "quantization_config"


@dataclass(frozen=True)
class Layer:
    """A layer that is written anew: its module, what its tensors' names begin with, its grid, and the run's tensors in
    whose place they come, by what their names end with."""

    module: LinearModule
    prefix: str
    bits: int
    group_size: int
    parts: Mapping[str, StoredTensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features


def packed_layers(run: FinishedRun) -> list[Layer]:
    """Return the layers that a run has packed, in the model's order."""
    rows = {row.name: row for row in run.report.layers}
    found = []
    for module in run.architecture.linear:
        parts = run.weights.packed_parts(module)
        if parts is not None:
            part, tensor = next(iter(parts.items()))
            row = rows[module.name]
            prefix = tensor.name.removesuffix(part)
            found.append(Layer(module, prefix, row.bits or 0, row.group_size or 0, parts))
    return found


@dataclass
class Rounded:
    """How many `groups` have been looked at, and how many of them the form does not hold."""

    groups: int = 0
    lost: int = 0


class CheckpointExport(Export[list[Layer]]):
    """What takes the place of each layer's tensors, and what config.json says of that."""

    levels = "levels of this form"  # what a group is that is held

    def layout(self, run: FinishedRun) -> list[Layer]:
        """Return the layers that are written anew."""
        return packed_layers(run)

    @abstractmethod
    def parts(self, run: FinishedRun, layer: Layer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of the tensors that stand for a layer, by what their names end with."""

    @abstractmethod
    def encode(self, run: FinishedRun, layer: Layer, rounded: Rounded) -> dict[str, torch.Tensor]:
        """Return these tensors; what they do not hold is counted."""

    def quantization_config(self, run: FinishedRun, layers: list[Layer]) -> dict[str, Any] | None:
        """Return what config.json says of how layers are stored, None for ordinary weights."""
        return None

    def load(self, report: Report) -> str:
        trusted = bool(report.recipe.get("trust_remote_code"))
        lines = load_snippet(report.loader, ".", trust_remote_code=trusted)
        return "".join(f"{line}\n" for line in ("```python", *lines, "```"))

    def reread(self, directory: Path, report: Report, *, trust_remote_code: bool) -> Reread:
        return RereadCheckpoint(directory, trust_remote_code=trust_remote_code)

    def nbytes(self, run: FinishedRun, layout: list[Layer]) -> int:
        return sum(spec.nbytes for spec in self._specs(run, layout).values()) + run.adapter_bytes

    def write(self, run: FinishedRun, layout: list[Layer], directory: Path, out: Path) -> str | None:
        layers, rounded = layout, Rounded()
        specs = self._specs(run, layers)
        writer = SafetensorsWriter(directory, specs.values())
        own = {layer.prefix + part for layer in layers for part in self.parts(run, layer)}
        for name in specs:
            if name not in own:
                writer.write_chunks(name, run.checkpoint.tensors[name].chunks())
        for layer in layers:
            for part, value in self.encode(run, layer, rounded).items():
                writer.write(layer.prefix + part, value)
        writer.close()
        config = {key: value for key, value in run.checkpoint.config.items() if key != QUANTIZATION}
        if (quantization := self.quantization_config(run, layers)) is not None:
            config[QUANTIZATION] = quantization
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for relative in run.checkpoint.companions():
            (directory / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.directory / relative, directory / relative)
        adapter = directory / ADAPTER_DIRECTORY
        adapter.mkdir()
        shutil.copyfile(run.adapter_directory / f"{WEIGHTS_STEM}.safetensors", adapter / f"{WEIGHTS_STEM}.safetensors")
        write_config(adapter, {**run.adapter.settings, "base_model_name_or_path": str(out)})
        if not rounded.lost:
            return None
        return f"{rounded.lost} of {rounded.groups} groups are no {self.levels}, and are rounded to such"

    def _specs(self, run: FinishedRun, layers: list[Layer]) -> dict[str, TensorSpec]:
        """Return what is written, by name: a layer's tensors where its first one stood."""
        taken = {tensor.name: layer for layer in layers for tensor in layer.parts.values()}
        specs: dict[str, TensorSpec] = {}
        for name, tensor in run.checkpoint.tensors.items():
            if name not in taken:
                specs[name] = TensorSpec(name, tensor.dtype, tensor.shape)
                continue
            layer = taken[name]
            for part, (dtype, shape) in self.parts(run, layer).items():
                specs[layer.prefix + part] = TensorSpec(layer.prefix + part, dtype, shape)
        return specs


def left_linear(run: FinishedRun, layers: list[Layer]) -> list[str]:
    """Return the names of the model's linear modules, the head too, that are none of the layers."""
    from torch import nn

    anew = {layer.module.name for layer in layers}
    return [name for name, kind in run.architecture.classes.items() if issubclass(kind, nn.Linear) and name not in anew]


def widths(layers: list[Layer]) -> dict[tuple[int, int], list[Layer]]:
    """Return the layers by bits and group size, the grid of most of them first."""
    found: dict[tuple[int, int], list[Layer]] = {}
    for layer in layers:
        found.setdefault((layer.bits, layer.group_size), []).append(layer)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))
