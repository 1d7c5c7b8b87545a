"""What a saved adapter makes of a model's parameters, one by one: what a merge writes in their places."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qinit.files.tensors import StoredTensor

# By the names that the model has for its parameters, and for experts by PARAMETER[i]; in the order of application.
Changes = dict[str, list["Change"]]


class Change(ABC):
    """What becomes of one parameter, or of one expert's slice of it."""

    words: str  # what it is, for people
    shared = False  # whether it is made of all parameters that share one tensor

    @abstractmethod
    def made(self, value: torch.Tensor) -> torch.Tensor:
        """Return the parameter in the layout in which it comes, float32; `value` stays as it is."""


@dataclass(frozen=True)
class Replaced(Change):
    """A parameter that was trained as a whole."""

    tensor: StoredTensor
    words: str = "trained whole"

    def made(self, value: torch.Tensor) -> torch.Tensor:
        return self.tensor.read().float()


@dataclass(frozen=True)
class Rows(Change):
    """Rows of an embedding that were trained."""

    rows: Sequence[int]
    tensor: StoredTensor
    words: str = "rows trained"
    shared = True

    def made(self, value: torch.Tensor) -> torch.Tensor:
        return value.index_copy(0, torch.tensor(self.rows), self.tensor.read().float())


@dataclass(frozen=True)
class Added(Change):
    """W + what a kind of adapter adds to a module's weight [out, in]: `added` computes it. `transposed`: the parameter
    is W^T."""

    words: str
    added: Callable[[], torch.Tensor]
    transposed: bool

    def made(self, value: torch.Tensor) -> torch.Tensor:
        added = self.added()
        return value + (added.T if self.transposed else added)


@dataclass(frozen=True)
class LowRankAdded(Change):
    """W + s B A, with A [r, in] and B [out, r], and with DoRA its rows brought to the lengths `magnitude` [out]
    (arXiv:2402.09353, eq. 5): m (W + s B A) / |W + s B A|. `transposed`: the parameter is W^T."""

    A: StoredTensor
    B: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    transposed: bool = False

    @property
    def words(self) -> str:  # type: ignore[override]
        return f"{'DoRA' if self.magnitude is not None else 'LoRA'}, rank {self.A.shape[0]}, scale {self.scale:g}"

    def made(self, value: torch.Tensor) -> torch.Tensor:
        W = value.T if self.transposed else value
        W = W + (self.B.read().float() @ self.A.read().float()).mul_(self.scale)
        if self.magnitude is not None:
            length = torch.linalg.norm(W, dim=1)
            W *= (self.magnitude.read().float().flatten() / length)[:, None]
        return W.T.contiguous() if self.transposed else W


@dataclass(frozen=True)
class BiasAdded(Change):
    """b + s times the bias of B."""

    tensor: StoredTensor
    scale: float
    words: str = "LoRA's bias"

    def made(self, value: torch.Tensor) -> torch.Tensor:
        return value + self.tensor.read().float().mul_(self.scale)
