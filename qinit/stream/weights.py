"""The parameters that a model computes with, one at a time, from what a checkpoint and an adapter hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qinit.adapters.reading import SavedAdapter
from qinit.files.tensors import StoredTensor
from qinit.formats import Format, format_of
from qinit.grids import Quantized
from qinit.source.checkpoint import Checkpoint, read_finite
from qinit.source.targets import Architecture, LinearModule, Target, stacked_targets
from qinit.stream.stored import HALVES


class ModelWeights:
    """A checkpoint's parameters by the names that the model has for them: packed layers are unpacked, and an adapter's
    s B A is added to the layers that it repairs.

    `linear` names the modules that the model's row of blocks is known by (all that read text if left out).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        linear: Sequence[str] | None = None,
        adapter: SavedAdapter | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint, self.trust_remote_code = checkpoint, trust_remote_code
        self.format = format_of(checkpoint.config)
        self.names = architecture.names_in(checkpoint)
        self.in_language = architecture.in_language
        self.modules = {f"{module.name}.weight": module for module in architecture.linear}
        heads = [] if architecture.head is None else [architecture.head]
        self.packable = {**self.modules, **{head.parameter: head for head in heads}}  # others may pack the head too
        self.stacks = stacked_targets(checkpoint, architecture)
        reading = (module.name for module in architecture.linear if architecture.in_language(module.name))
        self.linear = list(reading) if linear is None else linear
        self.adapter = adapter

    def has(self, name: str) -> bool:
        """Whether the checkpoint has that parameter, packed or not."""
        found = self.names.find(name) is not None or self._packed(name) is not None
        return found or name in self.stacks or bool(self.names.made_of(name))

    def read(self, name: str, device: torch.device, *, stored: bool = False) -> torch.Tensor | None:
        """Return a parameter in float32 on the device, None if there is none; as it is `stored`, if asked for and in 16
        bits. Raises CheckpointError for NaN, Inf."""
        found, module, packed = self.names.find(name), self.modules.get(name), self.packable.get(name)
        if packed is not None and self.format is not None and (parts := self._packed(name)) is not None:
            value = self.format.read(packed, parts, self.checkpoint.config, device)
            value = value.T.contiguous() if packed.transposed else value
        elif found is not None:
            value = read_finite(found, device)
            value = value if stored and value.dtype in HALVES else value.to(torch.float32)
        elif name in self.stacks:
            value = self._stacked(self.stacks[name], device)
        elif (made := self.names.make(name, read_finite)) is not None:
            value = made.to(device, torch.float32)
        else:
            return None
        if name in self.stacks and self.adapter is not None:
            change = self.adapter.change_of_stack(self.stacks[name][0].module, device)
            value = value if change is None else value.add_(change)
        if module is not None and self.adapter is not None:
            self.adapter.apply(module.name, value.T if module.transposed else value)
        return value

    def announce(self, prefix: str) -> None:
        """Have the system fetch the parameters whose names begin so, as they will be read next."""
        for name, parameter in self.names.parameter_of.items():
            if parameter.startswith(prefix):
                self.names.tensors[name].announce()

    def width(self, module: LinearModule) -> tuple[int, int] | None:
        """Return bits and group size of a packed layer, from headers alone; None for one that is not packed. Raises
        CheckpointError for tensors that do not fit config.json."""
        parts = self._packed(f"{module.name}.weight")
        if parts is None or self.format is None:
            return None
        return self.format.grid_of(module, parts, self.checkpoint.config)

    def codes(self, module: LinearModule) -> Quantized | None:
        """Return a packed layer as codes, zero points and scales, without the adapter; None for one that is not packed.
        Raises CheckpointError for tensors that do not fit config.json."""
        parts = self._packed(f"{module.name}.weight")
        if parts is None or not isinstance(self.format, Format):
            return None
        return self.format.read_codes(module, parts, self.checkpoint.config)

    def grid(self, module: LinearModule) -> Quantized | None:
        """Return the same with codes [out, 0], which are not read."""
        parts = self._packed(f"{module.name}.weight")
        if parts is None or not isinstance(self.format, Format):
            return None
        return self.format.read_grid(module, parts, self.checkpoint.config)

    def same(self, one: str, other: str) -> bool:
        """Whether two parameters that are both there hold the same."""
        a, b = self.names.find(one), self.names.find(other)
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            x, y = (self.read(name, torch.device("cpu")) for name in (one, other))
            return x is not None and y is not None and torch.equal(x, y)
        return a == b or all(torch.equal(x, y) for x, y in zip(a.chunks(), b.chunks(), strict=True))

    def _stacked(self, experts: list[Target], device: torch.device) -> torch.Tensor:
        """Put a parameter together from the matrices of its experts."""
        first = experts[0]
        shape = (first.module.out_features, first.module.in_features)[:: -1 if first.module.transposed else 1]
        value = torch.empty((len(experts), *shape), device=device)
        for matrix, expert in zip(value, experts, strict=True):
            parts = [read_finite(tensor, device) for tensor in expert.tensors]
            matrix.copy_(torch.cat(parts, dim=expert.outputs_side))
        return value

    def packed_parts(self, module: LinearModule) -> dict[str, StoredTensor] | None:
        """Return the tensors of a packed layer, by what they are called in the place of `weight`; None for others."""
        return self._packed(f"{module.name}.weight")

    @property
    def packed_head(self) -> LinearModule | None:
        """The model's output head, None where it is not packed."""
        heads = (module for name, module in self.packable.items() if name not in self.modules)
        return next((head for head in heads if self.packed_parts(head) is not None), None)

    def packed(self) -> dict[str, dict[str, StoredTensor]]:
        """Return the parts of every packed layer, the head too, by the name that the model has for its weight."""
        found = ((name, self._packed(name)) for name in self.packable)
        return {name: parts for name, parts in found if parts is not None}

    def _packed(self, name: str) -> dict[str, StoredTensor] | None:
        """Return the tensors that stand for a packed layer's weight, by what they are called in its place."""
        if self.format is None or not name.endswith(".weight"):
            return None
        stem, known = name.removesuffix("weight"), (*self.format.parts, *self.format.more_parts)
        found = {part: tensor for part in known if (tensor := self.names.find(stem + part)) is not None}
        return found if self.format.parts and found.keys() >= set(self.format.parts) else None
