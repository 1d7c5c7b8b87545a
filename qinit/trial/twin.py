"""The model that a run's files describe, as qinit reads them: ordinary weights Q + s B A in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qinit.adapters import CONFIG_NAME, WEIGHTS_STEM
from qinit.adapters.base import PREFIX
from qinit.adapters.reading import SavedAdapter, kind_of
from qinit.errors import CheckpointError
from qinit.files.tensors import read_header
from qinit.source.checkpoint import Checkpoint, read_json
from qinit.source.skeleton import build_model
from qinit.source.targets import read_architecture
from qinit.stream.weights import ModelWeights


def weights_of(run: Path, adapter: Path, *, trust_remote_code: bool = False) -> ModelWeights:
    """Return a run's weights with an adapter's changes in them, read when they are asked for. Raises CheckpointError
    for what is damaged, and for an adapter that changes more than weights."""
    checkpoint = Checkpoint.open(run, quantized=True)
    architecture = read_architecture(checkpoint, trust_remote_code)
    saved = SavedAdapter.open(adapter, whole=True)
    return ModelWeights(checkpoint, architecture, adapter=saved, trust_remote_code=trust_remote_code)


def trained_whole(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the parameters that an adapter's file holds as they are, a head mostly, by the model's names for them."""
    kind = kind_of(adapter, read_json(adapter / CONFIG_NAME, ""))
    header = read_header(adapter / f"{WEIGHTS_STEM}.safetensors")
    return {name.removeprefix(PREFIX): tensor.read() for name, tensor in header.items() if kind.part_of(name) is None}


def build_twin(weights: ModelWeights, others: Mapping[str, torch.Tensor]) -> Any:
    """Build the model with these weights; `others` are parameters that no file of the base has, or that were trained
    whole. Raises CheckpointError for one that nothing is there for."""
    checkpoint, trusted = weights.checkpoint, weights.trust_remote_code
    model = build_model(checkpoint, include_buffers=False, trust_remote_code=trusted).eval()
    cpu = torch.device("cpu")
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            stored = weights.read(f"{path}.{name}", cpu) if buffer is not None else None
            if stored is not None:
                module._buffers[name] = stored.to(buffer.dtype)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    values: dict[str, nn.Parameter] = {}
    for name in names:
        value = others[name].float() if name in others else weights.read(name, cpu)
        if value is not None:
            values[name] = nn.Parameter(value, requires_grad=False)
    tied = _tied(model, names)
    for name in names:
        if name not in values:
            same = next((other for other in tied[name] if other in values), None)
            if same is None:
                raise CheckpointError(f"{checkpoint.directory}: no tensor for the parameter {name}")
            values[name] = values[same]
    for name, parameter in values.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, parameter)
    return model


def _tied(model: Any, names: list[str]) -> dict[str, list[str]]:
    """Return for each parameter the names of all that the configuration ties it to."""
    model.tie_weights()
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(model.get_parameter(name)), []).append(name)
    return {name: group for group in groups.values() for name in group}
