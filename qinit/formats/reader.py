"""How a stored base is recognised, loaded and read, whoever wrote it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.source.targets import LinearModule


class Reader(ABC):
    """A form that a base is stored in. Stateless. The defaults pack nothing, and are loaded by transformers alone."""

    name: str
    title: str  # its name among people
    packages: tuple[str, ...] = ()  # that loading needs, beside transformers and peft
    moves_scales = False  # whether its writers move scales between layers, as AWQ does
    parts: tuple[str, ...] = ()  # what a packed layer's tensors are called in the place of `weight`
    more_parts: tuple[str, ...] = ()  # those that not every layer has
    head_note = ""  # why its loader reads no packed output head, "" where it does
    packed_experts_note = (  # why experts that are packed in this form are not read
        "transformers has experts as slices of 3-D parameters, and its loader of this form starts packed ones at random"
    )
    adapters: tuple[str, ...] = ("lora", "dora")  # the kinds that PEFT puts on a packed layer
    opening = ""  # what is done with a loaded `base` before PEFT gets it, in Python
    exact = True  # whether a model that is loaded in float32 has the values of `read`, and computes in it

    @abstractmethod
    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether a base with this config.json is stored in this form, by qinit or another program."""

    def loader_options(self, base: Path, config: dict[str, Any], *, trust_remote_code: bool) -> dict[str, Any]:
        """Return what `from_pretrained` of a base that is recognised needs to be told. Raises CheckpointError for a
        damaged configuration and where a package is missing."""
        return {}

    def opened(self, base: Any) -> Any:
        """Return a loaded model after what `opening` says."""
        return base

    def cannot_read(self, config: dict[str, Any]) -> str | None:
        """Return why `read` does not read the weights of a base that is recognised, or None."""
        return None

    def cannot_adapt(self, adapter: str) -> str | None:
        """Return why PEFT does not put this kind of adapter on a base of this form, or None."""
        if adapter in self.adapters:
            return None
        return f"PEFT puts no {adapter} on layers packed as {self.title} (its classes for them say so)"

    def grid_of(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]
    ) -> tuple[int, int]:
        """Return bits and group size of a packed layer, from headers and config.json. Raises CheckpointError for
        tensors that do not fit the module and config.json."""
        raise NotImplementedError(f"{self.name} packs no layers")  # pragma: no cover - it has no parts

    def read(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any], device: torch.device
    ) -> torch.Tensor:
        """Return a packed layer's weight [out, in] in float32, as the loader's kernels compute with it, from all its
        `parts`. Raises CheckpointError for tensors that do not fit config.json, and for NaN and Inf."""
        raise NotImplementedError(f"{self.name} packs no layers")  # pragma: no cover - it has no parts

    def missing_packages(self) -> list[str]:
        """Return which of the packages that loading needs are not installed."""
        return [package for package in self.packages if find_spec(package) is None]


def method_of(config: dict[str, Any]) -> str | None:
    """Return what config.json says that its weights are quantized as, None where it says nothing of that."""
    quantization = config.get("quantization_config")
    return str(quantization.get("quant_method")) if isinstance(quantization, dict) else None


def require_shape(tensor: StoredTensor, *expected: tuple[int, ...]) -> None:
    """Raise CheckpointError for a tensor that has none of the shapes that it may have."""
    if tensor.shape not in expected:
        raise CheckpointError(
            f"{tensor.file}: tensor '{tensor.name}' has shape {list(tensor.shape)}, expected {list(expected[0])} by "
            "config.json; config and weights belong to different models"
        )
