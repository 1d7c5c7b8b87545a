"""What every grid offers, and the quantized matrix that it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qinit.errors import QinitError
from qinit.linalg.chunks import ALL
from qinit.linalg.hessian import Hessian

DAMPING = 0.01  # of H's mean diagonal, as GPTQ's


@dataclass(frozen=True)
class Quantized:
    """Q [out, in] as a grid holds it; groups run along the inputs, the last one may be short.

    codes uint8 [out, in], on the exact grid the float32 values themselves; scales float32 [out, groups]; zeros uint8
    [out, groups], None for a grid without.
    """

    bits: int
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def rows(self, part: slice) -> Quantized:
        """Return these rows of it, in the same memory."""
        zeros = None if self.zeros is None else self.zeros[part]
        return replace(self, codes=self.codes[part], scales=self.scales[part], zeros=zeros)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.scales, *([] if self.zeros is None else [self.zeros])]


class Grid(ABC):
    """A set of values, the search for scales on it, and the rounding to it. Stateless."""

    name: str
    bits: tuple[int, ...]  # widths that the grid offers
    searches: tuple[str, ...]  # scale searches that the grid offers
    feeds_back = False  # whether it rounds under a Hessian: `round_gptq` and `descend`

    @abstractmethod
    def quantize(
        self,
        target: torch.Tensor,
        weight: torch.Tensor,
        *,
        bits: int,
        group_size: int,
        search: str,
        previous: Quantized | None = None,
    ) -> tuple[Quantized, torch.Tensor]:
        """Round `target` [out, in] (float32) to the grid, each value to the nearest.

        Returns the quantized matrix and the residual E = weight - Q (float32, [out, in]): what is left of
        the layer's weight. `previous`, the result for a nearby target, may be used to search around its
        scales only.
        """

    @abstractmethod
    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        """Return Q in float32, [out, in]."""

    @abstractmethod
    def bits_per_weight(self, bits: int, group_size: int) -> float:
        """Return the bits per weight that this grid's codes, scales and zeros take, packed."""

    def round_gptq(
        self,
        target: torch.Tensor,
        hessian: Hessian,
        *,
        bits: int,
        group_size: int,
        search: str,
        damp: float = DAMPING,
        act_order: bool = False,
        factor: torch.Tensor | None = None,
        in_place: bool = False,
        shards: Sequence[slice] = (ALL,),
    ) -> tuple[Quantized, torch.Tensor]:
        """Round `target` X [out, in] with error feedback under `hessian` H [in, in], so that tr(E H E') gets small; a
        function that makes H spares a copy of it. Returns Q and the residual E = X - Q.

        H is damped by `damp` times its mean diagonal; `factor` [in, in] is the Cholesky factor of that, where it is at
        hand, and may be overwritten; so may `target`, where E may take its place (`in_place`). With `act_order` the
        inputs are taken by falling H_kk. Of the rows only these `shards` are rounded, one after the other; what Q and
        E have in others means nothing.
        Raises QinitError for a grid that rounds to nearest only.
        """
        raise self._nearest_only()

    def descend(
        self,
        quantized: Quantized,
        residual: torch.Tensor,
        hessian: torch.Tensor,
        passes: int = 1,
        shards: Sequence[slice] = (ALL,),
    ) -> None:
        """Lower tr(E H E') by coordinate descent on codes and scales, in place; `residual` is E = X - Q [out, in]. Of
        the rows only these `shards` are looked at.
        Raises QinitError for a grid that rounds to nearest only."""
        raise self._nearest_only()

    def _nearest_only(self) -> QinitError:
        return QinitError(f"grid {self.name} rounds to nearest only; use a method whose rounding is nearest")
