"""What every storage format offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.grids import Grid, Quantized
from qinit.source.targets import Architecture, LinearModule, Target


class Format(ABC):
    """A storage format: how it writes Q, how it is read back, and what loads it. Stateless. The defaults hold any grid,
    bits and shape, as codes, and are loaded by transformers alone."""

    name: str
    title: str  # its name among people
    mixed_bits: bool  # whether a stock loader reads different widths in one model
    mixed_loaders = ""  # else what does, in words,
    mixed_note = ""  # and what to say of a run that has them
    holds_experts = True  # whether a stock loader reads slices of 3-D parameters that are stored so
    experts_note = ""  # why not
    packages: tuple[str, ...] = ()  # that loading needs, beside transformers and peft
    parts: tuple[str, ...] = ()  # what a packed layer's tensors are called in the place of `weight`

    def cannot_hold(self, grid: str, bits: int, group_size: int) -> str | None:
        """Return why this format holds no such grid at all, or None."""
        return None

    def cannot_load(self, architecture: Architecture) -> str | None:
        """Return why no stock loader takes this format for models of this class, or None."""
        return None

    def cannot_hold_shape(self, module: LinearModule, group_size: int) -> str | None:
        """Return why this format holds no matrix of this shape, or None."""
        return None

    def storage(self, target: Target) -> torch.dtype | None:
        """Return the dtype that Q is rounded to when stored, or None when its codes are stored."""
        return None

    @abstractmethod
    def specs(self, target: Target, bits: int, group_size: int) -> list[TensorSpec]:
        """Return the tensors that take the place of the target's weight."""

    @abstractmethod
    def encode(self, target: Target, quantized: Quantized, grid: Grid) -> dict[str, torch.Tensor]:
        """Return those tensors, by name."""

    @abstractmethod
    def decode(self, target: Target, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int) -> torch.Tensor:
        """Return Q [out, in] in float32 from those tensors, as the loader sees it: what undoes `encode`.

        The tensors must have the names, dtypes and shapes of `specs`, and no `flaws`.
        """

    def codes(
        self, target: Target, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int
    ) -> Quantized | None:
        """Return Q as codes, zero points and scales from those tensors; None for a format that stores no codes."""
        return None

    def scales(self, target: Target, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors, by name, that hold other scales [out, groups] for the same codes."""
        raise NotImplementedError(f"format {self.name} stores no codes")  # pragma: no cover - `codes` said so

    def flaws(
        self, target: Target, tensors: Mapping[str, torch.Tensor], group_size: int
    ) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong with the values of those tensors, beside NaN and Inf: the name, what was expected, what
        was found."""
        yield from ()

    def quantization_config(
        self, grids: dict[str, tuple[int, int]], kept: list[str], modules: Mapping[str, type] = MappingProxyType({})
    ) -> dict[str, Any] | None:
        """Return config.json's `quantization_config`, or None when there is none.

        `grids` are bits and group size of the quantized modules by name, in the model's order; `kept` are the other
        linear ones; `modules` has the classes of all of them by name.
        """
        return None

    def replaced(self, config: dict[str, Any], architecture: Architecture) -> set[str] | None:
        """Return the names of the modules that the loader replaces by packed ones for this config.json, None where
        nothing is known of that."""
        return None

    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether a base with this config.json is stored in this format, by qinit or another program."""
        return False

    def loader_options(self, base: Path, config: dict[str, Any], *, trust_remote_code: bool) -> dict[str, Any]:
        """Return what `from_pretrained` of a base that is recognised needs to be told. Raises CheckpointError for a
        damaged configuration and where a package is missing."""
        return {}

    def cannot_read(self, config: dict[str, Any]) -> str | None:
        """Return why `read` does not read the weights of a base that is recognised, or None."""
        return None

    def read(
        self,
        module: LinearModule,
        parts: Mapping[str, StoredTensor],
        config: dict[str, Any],
        device: torch.device,
    ) -> torch.Tensor:
        """Return a packed layer's weight [out, in] in float32, as the loader's kernels compute with it, from all its
        `parts`. Raises CheckpointError for tensors that do not fit config.json, and for NaN and Inf."""
        raise NotImplementedError(f"format {self.name} packs no layers")  # pragma: no cover - it has no parts

    def read_codes(self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]) -> Quantized:
        """Return a packed layer as codes, zero points and scales, on the CPU, from all its `parts`. Raises
        CheckpointError as `read` does, and for what no `Quantized` holds."""
        raise NotImplementedError(f"format {self.name} packs no layers")  # pragma: no cover - it has no parts

    def read_grid(self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]) -> Quantized:
        """Return the same with codes [out, 0]: what costs little to read. Raises what `read_codes` does."""
        raise NotImplementedError(f"format {self.name} packs no layers")  # pragma: no cover - it has no parts

    def missing_packages(self) -> list[str]:
        """Return which of the packages that loading needs are not installed."""
        return [package for package in self.packages if find_spec(package) is None]
