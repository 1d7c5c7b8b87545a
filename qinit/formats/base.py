"""What every storage format offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qinit.files.tensors import TensorSpec
from qinit.grids import Grid, Quantized
from qinit.source.targets import LinearModule, Target


class Format(ABC):
    """A storage format. Stateless. The defaults hold any grid, bits and shape, as codes."""

    name: str
    mixed_bits: bool  # whether a stock loader reads different widths in one model

    def cannot_hold(self, grid: str, bits: int, group_size: int) -> str | None:
        """Return why this format holds no such grid at all, or None."""
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

    def flaws(
        self, target: Target, tensors: Mapping[str, torch.Tensor], group_size: int
    ) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong with the values of those tensors, beside NaN and Inf: the name, what was expected, what
        was found."""
        yield from ()

    def quantization_config(self, widths: dict[str, int], group_size: int, kept: list[str]) -> dict[str, Any] | None:
        """Return config.json's `quantization_config`, or None when there is none.

        `widths` are the bits of the quantized modules by name, in the model's order; `kept` are the other modules.
        """
        return None
