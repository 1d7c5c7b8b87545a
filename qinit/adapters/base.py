"""What every kind of adapter offers, and where a run keeps its own."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qinit.adapters.changes import Added, Changes
from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.linalg.low_rank import LowRank
from qinit.recipe import Recipe
from qinit.source.targets import Architecture, LinearModule

ADAPTER_DIRECTORY = "eqft_init"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_STEM = "adapter_model"
PREFIX = "base_model.model."  # of every tensor that PEFT saves

Ranks = Sequence[tuple[LinearModule, int]]  # modules, each with the rank of its adapter


class Adapter(ABC):
    """A kind of adapter: how what repairs a layer is stored so that PEFT trains it, and what it adds to the layer's
    weight. Stateless."""

    name: str
    peft_type: str  # in adapter_config.json
    experts = False  # whether experts that are slices of a 3-D parameter get one; what that takes has no defaults
    reads_base = False  # whether what is stored depends on Q too

    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether a saved adapter with this adapter_config.json is of this kind."""
        return bool(config.get("peft_type") == self.peft_type)

    @abstractmethod
    def specs(self, module: LinearModule, rank: int) -> list[TensorSpec]:
        """Return what is stored for one module; of an expert its parts of what is stored for all. This and what follows
        is asked for ranks from 1 on."""

    def file_specs(self, modules: Ranks) -> list[TensorSpec]:
        """Return what stands in the file for these modules: experts that are slices of one parameter together."""
        return [spec for module, rank in modules if rank for spec in self.specs(module, rank)]

    def split(self, modules: Ranks, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Return the tensors of such a file by the names of `specs`."""
        return dict(tensors)

    @abstractmethod
    def encode(
        self,
        module: LinearModule,
        low_rank: LowRank | None,
        rank: int,
        scale: float,
        seed: int,
        base: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return those tensors for L = B A, on the CPU; without one PEFT's own start, which changes nothing. `base`
        is Q [out, in], float32, for a kind that reads it."""

    @abstractmethod
    def decode(self, module: LinearModule, tensors: Mapping[str, torch.Tensor], scale: float) -> LowRank:
        """Return L = B A from those tensors, with the scale in it: what undoes `encode`, but for rounding."""

    @abstractmethod
    def config(self, recipe: Recipe, architecture: Architecture, ranks: Ranks, base: str) -> dict[str, Any]:
        """Return adapter_config.json for these modules and ranks on the base of that name."""

    @abstractmethod
    def part_of(self, tensor: str) -> tuple[str, str] | None:
        """Return a saved tensor's module and which part of its adapter it is; None for what is no part of one."""

    @abstractmethod
    def beyond(self, config: dict[str, Any], parts: Mapping[str, Mapping[str, object]]) -> str | None:
        """Return what of a saved adapter `change` does not compute, or None: an option of its configuration, or a
        module without all its parts."""

    @abstractmethod
    def change(self, module: str, parts: Mapping[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
        """Return what PEFT adds to a module's weight [out, in], in float32, from all its parts."""

    def apply(
        self, module: str, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], config: dict[str, Any]
    ) -> torch.Tensor:
        """Return what PEFT makes of a module's weight [out, in], float32, which is changed in place."""
        return weight.add_(self.change(module, parts, config))

    def change_of_stack(
        self, expert: LinearModule, parts: Mapping[str, torch.Tensor], config: dict[str, Any]
    ) -> torch.Tensor:
        """Return the same for the whole 3-D parameter that an expert is a slice of, in the parameter's layout."""
        raise NotImplementedError(f"adapter {self.name} has none for experts")  # pragma: no cover - it says so

    def changes(
        self, directory: Path, config: dict[str, Any], tensors: Mapping[str, StoredTensor], architecture: Architecture
    ) -> Changes:
        """Return what the adapter in a directory makes of the parameters of a model. Raises CheckpointError for what a
        merge does not take."""
        parts: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in tensors.items():
            if (place := self.part_of(name)) is None:
                raise CheckpointError(f"{directory}: cannot be merged: '{name}' is no part of {self.peft_type}")
            parts.setdefault(place[0], {})[place[1]] = tensor
        if (more := self.beyond(config, parts)) is not None:
            raise CheckpointError(f"{directory}: cannot be merged: more than what {self.peft_type} adds ({more})")
        modules = {module.name: module for module in architecture.linear}
        if others := sorted(parts.keys() - modules.keys()):
            raise CheckpointError(f"{directory}: cannot be merged: {others[0]} is no linear layer of the model")
        changes: Changes = {}
        for name, found in parts.items():
            added = partial(self._read_change, name, found, config)
            changes[f"{name}.weight"] = [Added(self.name, added, modules[name].transposed)]
        return changes

    def _read_change(self, module: str, parts: Mapping[str, StoredTensor], config: dict[str, Any]) -> torch.Tensor:
        return self.change(module, {part: tensor.read() for part, tensor in parts.items()}, config)

    @abstractmethod
    def is_neutral(self, module: LinearModule, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether the tensors of `specs` change nothing."""

    def stack_of(self, module: LinearModule) -> str:
        """Return what `part_of` calls a module; for an expert, the module that has its 3-D parameter."""
        return module.name

    def names(self, module: LinearModule, rank: int = 1) -> list[str]:
        """Return the names of what is stored for one module, none at rank 0."""
        return [spec.name for spec in self.specs(module, rank)] if rank else []


def write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
