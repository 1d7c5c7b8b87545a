"""A base that others have quantized, as a model to start from: its packed layers seen as the weights that its loader
makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import CHUNK_BYTES, StoredTensor
from qinit.formats.reader import Reader
from qinit.machine import CPU
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import Architecture, LinearModule


@dataclass(frozen=True)
class UnpackedTensor(StoredTensor):
    """The weight of a packed layer in float32, unpacked whenever it is read; `parts` are what it is stored as."""

    reader: Reader = field(compare=False)
    module: LinearModule = field(compare=False)
    parts: Mapping[str, StoredTensor] = field(compare=False)
    config: Mapping[str, Any] = field(compare=False, repr=False)

    def read(self, device: torch.device = CPU) -> torch.Tensor:
        value = self.reader.read(self.module, self.parts, dict(self.config), device)
        return value.T.contiguous() if self.module.transposed else value

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[torch.Tensor]:
        yield from self.read().flatten().view(torch.uint8).split(size)

    def first_bytes(self, count: int) -> bytes:
        return self.read().flatten().view(torch.uint8)[:count].numpy().tobytes()

    def announce(self) -> None:
        for part in self.parts.values():
            part.announce()


def unpacked(checkpoint: Checkpoint, architecture: Architecture, reader: Reader) -> Checkpoint:
    """Return a base as if its loader had unpacked it, tensor by tensor as they are read. Memory: one layer. Raises
    CheckpointError for an embedding or experts that are packed, which are not read, and for tensors that do not fit."""
    names, tensors = architecture.names_in(checkpoint), dict(checkpoint.tensors)
    for module in (*architecture.linear, *([architecture.head] if architecture.head else [])):
        known = (*reader.parts, *reader.more_parts)
        found = {part: tensor for part in known if (tensor := names.find(f"{module.name}.{part}")) is not None}
        if not reader.parts or not found.keys() >= set(reader.parts):
            continue
        reader.grid_of(module, found, checkpoint.config)  # before the first weight is read
        first = found[reader.parts[0]]
        name = f"{first.name.removesuffix(reader.parts[0])}weight"
        for tensor in found.values():
            tensors.pop(tensor.name)
        shape = (module.out_features, module.in_features)[:: -1 if module.transposed else 1]
        more = reader, module, found, checkpoint.config
        tensors[name] = UnpackedTensor(name, torch.float32, shape, first.file, first.offset, *more)
    left = next((name for name in tensors if any(name.endswith(f".{part}") for part in _own_parts(reader))), None)
    if left is not None:
        raise CheckpointError(
            f"{tensors[left].file}: has '{left}' for what is no linear layer: a packed embedding or expert is not "
            "read; give --source, the model that it was quantized from"
        )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return replace(checkpoint, config=config, tensors=tensors)


def _own_parts(reader: Reader) -> list[str]:
    """Return what the tensors of packed layers alone are called."""
    return [part for part in reader.parts if part != "weight"]
