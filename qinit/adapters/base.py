"""What every kind of adapter offers, and where a run keeps its own."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

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

    @abstractmethod
    def specs(self, module: LinearModule, rank: int) -> list[TensorSpec]:
        """Return what is stored for one module, nothing at rank 0; of an expert its parts of what is stored for all."""

    @abstractmethod
    def file_specs(self, modules: Ranks) -> list[TensorSpec]:
        """Return what stands in the file for these modules: experts that are slices of one parameter together."""

    @abstractmethod
    def split(self, modules: Ranks, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Return the tensors of such a file by the names of `specs`."""

    @abstractmethod
    def encode(
        self, module: LinearModule, low_rank: LowRank | None, rank: int, scale: float, seed: int
    ) -> dict[str, torch.Tensor]:
        """Return those tensors for L = B A, on the CPU; without one PEFT's own start, which changes nothing. At rank 0
        there are none."""

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

    @abstractmethod
    def change_of_stack(
        self, expert: LinearModule, parts: Mapping[str, torch.Tensor], config: dict[str, Any]
    ) -> torch.Tensor:
        """Return the same for the whole 3-D parameter that an expert is a slice of, in the parameter's layout."""

    @abstractmethod
    def is_neutral(self, module: LinearModule, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether the tensors of `specs` change nothing."""

    @abstractmethod
    def stack_of(self, module: LinearModule) -> str:
        """Return what `part_of` calls the module that has an expert's 3-D parameter."""

    def names(self, module: LinearModule, rank: int) -> list[str]:
        """Return the names of what is stored for one module."""
        return [spec.name for spec in self.specs(module, rank)]


def write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
