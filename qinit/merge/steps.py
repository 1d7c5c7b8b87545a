"""What a merge does, one value at a time: read, change, write to its places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qinit.adapters.changes import Change, Changes
from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.report.report import Report
from qinit.source.checkpoint import read_finite
from qinit.source.targets import Architecture, Target, expert_targets
from qinit.stream.weights import ModelWeights

CPU = torch.device("cpu")
Tie = list[list[str]]  # parameters that share a tensor, in groups that the model has as one whatever config.json says


@dataclass(frozen=True)
class Step:
    """One value and the places in the output that hold it, one after the other along `side`: a tensor, or for experts a
    slice of one or several. `tensors` hold it in the run, unless it is the parameter `packed`."""

    name: str
    places: tuple[TensorSpec, ...]
    tensors: tuple[StoredTensor, ...] = ()
    packed: str | None = None
    changes: tuple[Change, ...] = ()
    side: int = 0

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.places)

    @property
    def is_plain(self) -> bool:
        """Whether the values are those of the run's tensors, in whatever type."""
        return self.packed is None and not self.changes

    def value(self, weights: ModelWeights) -> torch.Tensor:
        """Return what the run's base has, in float32. Raises CheckpointError for NaN and Inf."""
        if self.packed is not None:
            found = weights.read(self.packed, CPU)
            assert found is not None
            return found
        return torch.cat([read_finite(tensor) for tensor in self.tensors], dim=self.side).float()

    def split(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Return what goes to the places, in their types."""
        if len(self.places) == 1:
            return [value.to(self.places[0].dtype)]
        parts = value.split([place.shape[self.side] for place in self.places], dim=self.side)
        return [part.to(place.dtype).contiguous() for part, place in zip(parts, self.places, strict=True)]


@dataclass(frozen=True)
class Layout:
    """The output's tensors in the run's order, the steps that fill them, and those that come in slices; `untied` are
    parameters that share a tensor in the run and have one of their own here."""

    specs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    sliced: frozenset[str]
    untied: tuple[str, ...]

    def split(self, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Return tensors of the output by name, those in `sliced` slice by slice."""
        parts = (part for name, t in tensors.items() for part in (t.slices() if name in self.sliced else [t]))
        return {part.name: part for part in parts}


class Laying:
    """Lays out a merge: every tensor of the run's base as it is or changed, packed layers as ordinary weights, in
    `dtype` or the type that the model that the run was made from has."""

    def __init__(
        self,
        weights: ModelWeights,
        architecture: Architecture,
        report: Report,
        changes: Changes,
        dtype: torch.dtype | None,
    ) -> None:
        self._weights, self._architecture, self._report, self._dtype = weights, architecture, report, dtype
        self._changes = dict(changes)
        self._where = weights.checkpoint.directory

    def laid_out(self, ties: list[Tie]) -> Layout:
        """`ties` are the parameters that share a tensor. Raises CheckpointError
        for a changed parameter that no tensor of the run is."""
        tensors = self._weights.checkpoint.tensors
        packed = {part.name: name for name, parts in self._weights.packed().items() for part in parts.values()}
        experts = self._experts()
        slices = {part.name for target in experts for part in target.tensors}
        sliced = frozenset(name.rpartition("[")[0] for name in slices - tensors.keys())
        specs: list[TensorSpec] = []
        steps: list[Step] = []
        done: set[str] = set()
        extra = list(self._untied(ties))
        for name, tensor in tensors.items():
            if (parameter := packed.get(name)) is not None:
                if parameter not in done:
                    done.add(parameter)
                    steps.append(self._packed_step(name, parameter))
                    specs += steps[-1].places
                continue
            spec = TensorSpec(name, self._type(tensor.dtype), tensor.shape)
            specs.append(spec)
            if name not in sliced and name not in slices:
                own = self._weights.names.parameter_of.get(name, "")
                changes = self._taken(own) if self._weights.names.find(own) == tensor else ()
                steps.append(Step(name, (spec,), (tensor,), changes=changes))
        for target in experts:
            places = tuple(TensorSpec(t.name, self._type(t.dtype), t.shape) for t in target.tensors)
            changes = self._taken(target.name)
            steps.append(Step(target.name, places, target.tensors, changes=changes, side=target.outputs_side))
        specs += [place for step in extra for place in step.places]
        if self._changes:
            raise self._cannot(next(iter(self._changes)), "no single tensor of the run is it")
        return Layout(tuple(specs), (*steps, *extra), sliced, tuple(step.name for step in extra))

    def _experts(self) -> list[Target]:
        """Return all experts of the parameters that are changed: their tensors are cut into slices."""
        found = expert_targets(self._weights.checkpoint, self._architecture)
        stacks = {target.module.parameter for target in found if target.name in self._changes}
        return [target for target in found if target.module.parameter in stacks]

    def _taken(self, name: str) -> tuple[Change, ...]:
        return tuple(self._changes.pop(name, ()))

    def _type(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def _packed_step(self, part: str, parameter: str) -> Step:
        module = self._weights.modules[parameter]
        name = f"{part.rpartition('.')[0]}.weight"
        shape = (module.out_features, module.in_features)[:: -1 if module.transposed else 1]
        place = TensorSpec(name, self._type(self._source_type(module.name)), shape)
        return Step(name, (place,), packed=parameter, changes=self._taken(parameter))

    def _source_type(self, module: str) -> torch.dtype:
        """Return the type of a packed layer's weight in the model that it was made from: float32 by its size there,
        else the 16-bit type of the rest."""
        row = next((row for row in self._report.layers if row.name == module), None)
        if row is not None and row.bytes_before == 4 * row.shape[0] * row.shape[1]:
            return torch.float32
        return common_type(self._weights)

    def _untied(self, ties: list[Tie]) -> Iterator[Step]:
        """Give parameters that share a tensor one of their own where they come to differ: rows that were trained are
        trained in all of them (as PEFT does), anything else in the one that the adapter names."""
        for tie in ties:
            names = [name for group in tie for name in group]
            stored = next((name for name in names if self._weights.names.find(name) is not None), None)
            changed = [name for name in names if name in self._changes]
            if stored is None or not changed:
                continue
            tensor = self._weights.names.find(stored)
            assert tensor is not None
            if all(change.shared for name in changed for change in self._changes[name]):
                self._changes[stored] = [change for name in changed for change in self._changes.pop(name)]
                continue
            for group in tie:
                name = next((name for name in group if name in changed), group[0])
                if len(group) > 1 and name in changed:
                    raise self._cannot(name, f"the model has it as one with {', '.join(n for n in group if n != name)}")
                if stored in group:
                    continue
                if not self._weights.names.arrives(name, name):
                    raise self._cannot(name, "it would need a tensor of its own, and the loader renames it")
                place = TensorSpec(name, self._type(tensor.dtype), tensor.shape)
                yield Step(name, (place,), (tensor,), changes=self._taken(name))

    def _cannot(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: what the adapter makes of {name} cannot be merged: {why}")


def common_type(weights: ModelWeights) -> torch.dtype:
    """Return the 16-bit type that config.json names, or that most of the base's numbers have; bfloat16 where there is
    none."""
    packed = {part.name for parts in weights.packed().values() for part in parts.values()}
    halves = (torch.bfloat16, torch.float16)
    counts = dict.fromkeys(halves, 0)
    for name, tensor in weights.checkpoint.tensors.items():
        if name not in packed and tensor.dtype in counts:
            counts[tensor.dtype] += tensor.numel
    named = weights.checkpoint.config.get("dtype", weights.checkpoint.config.get("torch_dtype"))
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in halves}
    return by_name.get(str(named)) or max(halves, key=lambda dtype: counts[dtype])
