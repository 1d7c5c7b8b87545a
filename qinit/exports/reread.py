"""An export read back: what its reader will have, by the names that the run's model has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch

from qinit.adapters import ADAPTER_DIRECTORY
from qinit.adapters.reading import SavedAdapter
from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.formats import format_of
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import read_architecture
from qinit.stream.weights import ModelWeights

CPU = torch.device("cpu")


class Reread(ABC):
    """One tensor is in memory at a time. All raise CheckpointError for tensors that do not fit."""

    tensors: Mapping[str, StoredTensor]  # of base and adapter, as they are stored

    @abstractmethod
    def value(self, parameter: str) -> torch.Tensor | None:
        """Return a parameter of the base in float32, None if there is none."""

    @abstractmethod
    def change(self, module: str) -> torch.Tensor | None:
        """Return s B A [out, in] of a module in float32, None for one without an adapter."""


class RereadCheckpoint(Reread):
    """An export that is a checkpoint of transformers' own, with PEFT's adapter."""

    def __init__(self, directory: Path, *, trust_remote_code: bool) -> None:
        checkpoint = Checkpoint.open(directory, quantized=True)
        form = format_of(checkpoint.config)
        problem = "a form that is not known" if form is None else form.cannot_read(checkpoint.config)
        if problem:
            raise CheckpointError(f"{directory / 'config.json'}: its weights are packed as {problem}")
        architecture = read_architecture(checkpoint, trust_remote_code)
        self.weights = ModelWeights(checkpoint, architecture, trust_remote_code=trust_remote_code)
        self.adapter = SavedAdapter.open(directory / ADAPTER_DIRECTORY, whole=True)
        factors = (tensor for parts in self.adapter.parts.values() for tensor in parts.values())
        self.tensors = {**checkpoint.tensors, **{tensor.name: tensor for tensor in factors}}

    def value(self, parameter: str) -> torch.Tensor | None:
        return self.weights.read(parameter, CPU)

    def change(self, module: str) -> torch.Tensor | None:
        return self.adapter.change(module, CPU)
