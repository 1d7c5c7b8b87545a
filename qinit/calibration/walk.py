"""Walks through a model block by block: measures what each layer sees, and lets later layers see the repair."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qinit.calibration.activations import (
    batch_size,
    caught,
    keep_first,
    oriented,
    require_finite_input,
    rows_of,
    unpadded,
)
from qinit.calibration.meter import Meter
from qinit.calibration.residual_stream import writes_to
from qinit.events import Measuring, Passing
from qinit.plan.plan import LayerPlan, Plan
from qinit.solver.statistics import Statistics
from qinit.stream.blocks import Blocks, Row
from qinit.stream.carried import Batch, Calls, Carried, batches_of
from qinit.text.samples import Samples


@dataclass(frozen=True)
class Seen:
    """A layer, its weight [out, in] in float32 and what it has seen (None if the text never reached it). Where
    `repair` is given, it is to be called with the layer and the weight that the trainer will have."""

    layer: LayerPlan
    weight: torch.Tensor
    statistics: Statistics | None
    repair: Callable[[LayerPlan, torch.Tensor], None] | None = None


@dataclass
class _Group:
    """Layers of one block that read the same input. `writes` says what a layer's output is added to: the block's
    input (`input`), the block's output (`output`), or unknown (None)."""

    layers: list[LayerPlan]
    writes: dict[str, str | None] = field(default_factory=dict)


class Walk:
    """Iterate to get every block that has layers, with its weights in memory and the text in front of it; once a block
    is done with, the text goes on through it. Layers outside of the row of blocks are not visited.

    In mode `sequential` two models run side by side, the original and the repaired one, and every group of layers
    is measured after the layers in front of it have been repaired. In mode `parallel` only the original runs, once.

    Layers named in `finished` are not yielded again; `weight_of` gives the weight [out, in] that they were repaired to.
    All others see the same as if the walk had not been broken off, to the last bit. With `whole_blocks` a block is
    finished only if all of its layers are.

    Raises NotStreamable (from the constructor and the first step), CalibrationError for NaN or Inf activations.
    """

    def __init__(
        self,
        plan: Plan,
        samples: Samples,
        device: torch.device,
        mode: str,
        scratch: Path | None = None,
        finished: Collection[str] = (),
        weight_of: Callable[[LayerPlan], torch.Tensor] | None = None,
        whole_blocks: bool = False,
    ):
        self.plan, self.samples, self.device = plan, samples, device
        self.sequential = mode == "sequential"
        self.blocks = Blocks.of(plan, device)
        self.row = self.blocks.row
        self.layers = {layer.target.name: layer for layer in plan.quantized}
        self.batch = batch_size(plan, samples)
        self.scratch = scratch
        self.finished, self.weight_of = frozenset(finished), weight_of
        if whole_blocks:
            blocks = [self._names(index) for index in range(len(self.row))]
            self.finished = frozenset(name for names in blocks if self.finished.issuperset(names) for name in names)
        self.writes: dict[tuple[type, str], str | None] = {}  # what layers of a kind write to, as far as it was tried
        self.diverged = False  # whether anything has been repaired yet

    def __iter__(self) -> Generator[OpenBlock, None, None]:
        row = self.row
        open_blocks = [index for index in range(len(row)) if not self.finished.issuperset(self._names(index))]
        if not open_blocks:
            return
        with torch.no_grad(), tempfile.TemporaryDirectory(dir=self.scratch) as directory:
            batches = list(batches_of(self.samples, self.batch))
            original, calls = self._start(row, batches, Path(directory))
            repaired = original.twin(Path(directory)) if self.sequential else original
            for index in range(open_blocks[-1] + 1):
                module = row.load(index)
                states = States(index, batches, calls, original, repaired)
                block = OpenBlock(self, module, copy.deepcopy(module) if self.sequential else None, states)
                try:
                    if block.names:
                        yield block
                    if index < open_blocks[-1]:
                        self._advance(original, module, states)
                        if block.repaired is not None:
                            self._advance(repaired, block.repaired, states)
                finally:
                    block.repaired = None
                    row.unload(index)

    def visit(self) -> Iterator[Measuring | Passing | Seen]:
        """Yield the layers of all blocks, one block after the other."""
        with closing(iter(self)) as blocks:
            for block in blocks:
                yield from block.visit()

    def _names(self, index: int) -> list[str]:
        return [name for name in self.layers if name.startswith(self.row.prefix(index))]

    def _start(self, row: Row, batches: list[Batch], directory: Path) -> tuple[Carried, Calls]:
        calls = Calls()
        carried: Carried | None = None
        with self.blocks.surroundings():
            for batch in batches:
                hidden, found = row.calls(self.samples.tokens[batch.rows], batch.long_mask)
                calls.add(batch, found)
                if carried is None:
                    shape = (len(self.samples.tokens), *hidden.shape[1:])
                    carried = Carried(shape, directory / "original", streams=2 if self.sequential else 1)
                carried.write(batch, hidden)
        assert carried is not None
        return carried, calls

    def _advance(self, carried: Carried, module: nn.Module, states: States) -> None:
        for batch in states.batches:
            call = states.calls.of(batch, states.index)
            carried.write(batch, call(module, carried.read(batch).to(self.device)))


@dataclass(frozen=True)
class States:
    """The text in front of block `index`: the hidden states of both models, in batches, and how the block is called
    with each of them."""

    index: int
    batches: list[Batch]
    calls: Calls
    original: Carried
    repaired: Carried


class OpenBlock:
    """A block of the walk: the original `module` with its weights, the `repaired` one (None in mode `parallel`), the
    text in front of both (`states`), and the names of the `layers` in it."""

    def __init__(self, walk: Walk, module: nn.Module, repaired: nn.Module | None, states: States) -> None:
        self.walk, self.module, self.repaired, self.states = walk, module, repaired, states
        self.prefix = walk.row.prefix(states.index)
        self.names = walk._names(states.index)

    def repair(self, layer: LayerPlan, weight: torch.Tensor) -> None:
        """Put `weight` [out, in] in the layer's place for all that follows."""
        self.walk.diverged = True
        if self.repaired is not None:
            linear: Any = self.repaired.get_submodule(self._inner(layer.target.name))
            linear.weight.data = oriented(weight, layer)

    def visit(self) -> Iterator[Measuring | Passing | Seen]:
        """Yield the block's layers with what they see, each to be solved and repaired before the next is asked for."""
        walk, finished = self.walk, self.walk.finished.issuperset(self.names)
        index, count = self.states.index, len(walk.row)
        if finished:
            yield Passing(index, count)
        groups, unreached = self._groups()
        if walk.sequential:
            for group in groups:
                if not self._finished(group.layers):
                    yield Measuring(index, count, tuple(layer.target.name for layer in group.layers))
                yield from self._measured([group])
        elif groups:
            if not finished:
                yield Measuring(index, count, tuple(self.names))
            yield from self._measured(groups)
        for layer in unreached:
            yield from self._given(layer, None)

    def _measured(self, groups: list[_Group]) -> Iterator[Seen]:
        states, device = self.states, self.walk.device
        diverged = self.walk.diverged and self.repaired is not None
        running = self.repaired if diverged else self.module
        assert running is not None
        meters = [Meter(group.layers, device, drift=diverged) for group in groups]
        wanted = {self._inner(layer.target.name) for group in groups for layer in group.layers}
        whole = diverged and any(w == "output" for group in groups for w in group.writes.values())
        finished = all(self._finished(group.layers) for group in groups)
        for batch in () if finished else states.batches:
            call = states.calls.of(batch, states.index)
            now = (states.repaired if diverged else states.original).read(batch).to(device)
            inputs, outputs, end = caught(running, call, now, wanted, whole)
            if diverged:
                then = states.original.read(batch).to(device)
                _, clean_outputs, clean_end = caught(self.module, call, then, wanted, whole)
            for group, meter in zip(groups, meters, strict=True):
                first = self._inner(group.layers[0].target.name)
                if first not in inputs:
                    continue
                require_finite_input(inputs[first], group.layers[0].target.name, batch.start, self.walk.samples)
                x = unpadded(inputs[first], batch.mask)
                differences: dict[str, torch.Tensor] = {}
                if diverged and len(rows_of(inputs[first])) == len(rows_of(now)):
                    for layer in group.layers:
                        inner, writes = self._inner(layer.target.name), group.writes.get(layer.target.name)
                        if inner not in clean_outputs or clean_outputs[inner].shape != outputs[inner].shape:
                            continue  # an expert that sees other tokens in the two models
                        difference = rows_of(clean_outputs[inner] - outputs[inner])
                        if writes == "output":
                            difference = rows_of(clean_end - end)
                        elif writes == "input":
                            difference += rows_of(then - now)
                        differences[layer.target.name] = unpadded(difference, batch.mask)
                meter.add(x, differences)
        for group, meter in zip(groups, meters, strict=True):
            for layer in group.layers:
                yield from self._given(layer, meter.statistics(layer))

    def _given(self, layer: LayerPlan, statistics: Statistics | None) -> Iterator[Seen]:
        """Yield a layer to be solved, or repair one as it was before."""
        if layer.target.name not in self.walk.finished:
            linear: Any = self.module.get_submodule(self._inner(layer.target.name))
            weight = oriented(linear.weight.data, layer)
            yield Seen(layer, weight, statistics, self.repair if self.walk.sequential else None)
        elif self.walk.sequential:
            assert self.walk.weight_of is not None
            self.repair(layer, self.walk.weight_of(layer))

    def _finished(self, layers: list[LayerPlan]) -> bool:
        return all(layer.target.name in self.walk.finished for layer in layers)

    def _groups(self) -> tuple[list[_Group], list[LayerPlan]]:
        """Find, by running the block once, which layers share an input, in the order in which they run."""
        walk, states = self.walk, self.states
        call = states.calls.of(states.batches[0], states.index)
        hidden = states.original.read(states.batches[0]).to(walk.device)
        groups: list[_Group] = []
        seen: list[torch.Tensor] = []
        order: dict[str, torch.Tensor] = {}
        wanted = {self._inner(name): name for name in self.names}

        def keep(inner: str) -> Any:
            return lambda _module, args: keep_first(order, inner, args[0])

        hooks = [self.module.get_submodule(inner).register_forward_pre_hook(keep(inner)) for inner in wanted]
        call(self.module, hidden)
        for hook in hooks:
            hook.remove()
        for inner, x in order.items():
            name = wanted[inner]
            shared = next((g for g, other in zip(groups, seen, strict=True) if other is x), None)
            if shared is None:
                shared = _Group([])
                groups.append(shared)
                seen.append(x)
            shared.layers.append(walk.layers[name])
            if walk.sequential and walk.layers[name].target.module.out_features == hidden.shape[-1]:
                kind = (type(self.module), inner)
                if kind not in walk.writes:
                    walk.writes[kind] = writes_to(self.module, self.module.get_submodule(inner), call, hidden)
                shared.writes[name] = walk.writes[kind]
        return groups, [walk.layers[name] for inner, name in wanted.items() if inner not in order]

    def _inner(self, name: str) -> str:
        return name.removeprefix(self.prefix)
