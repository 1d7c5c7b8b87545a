"""A stored tensor in other coordinates: its rows and columns are scaled as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from qinit.files.tensors import CHUNK_BYTES, StoredTensor
from qinit.machine import CPU


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """A matrix times `factors`, each of which is [rows, 1] or [1, columns]. `read` gives float32, so that nothing is
    rounded; in all else it is of the type that it is stored in."""

    factors: tuple[torch.Tensor, ...] = field(compare=False)

    @classmethod
    def of(cls, tensor: StoredTensor, factor: torch.Tensor) -> ScaledTensor:
        """Return a tensor that is scaled, or scaled further."""
        before = tensor.factors if isinstance(tensor, ScaledTensor) else ()
        return cls(tensor.name, tensor.dtype, tensor.shape, tensor.file, tensor.offset, (*before, factor.float()))

    def read(self, device: torch.device = CPU) -> torch.Tensor:
        value = super().read(device).float()
        for factor in self.factors:
            value *= factor.to(device)
        return value

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[torch.Tensor]:
        yield from self.read().to(self.dtype).flatten().view(torch.uint8).split(size)
