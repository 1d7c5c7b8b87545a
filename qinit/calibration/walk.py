"""Walks through a model block by block, measures what each layer sees, and lets later layers see the repair."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qinit.calibration.activations import _keep_first, _rows, _run, batch_size, oriented, require_finite_input, unpadded
from qinit.calibration.meter import Meter
from qinit.calibration.residual_stream import _writes
from qinit.events import Measuring, Passing
from qinit.plan.plan import LayerPlan, Plan
from qinit.solver.statistics import Statistics
from qinit.stream.blocks import Blocks, Call
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
    """Iterate to get `Measuring`, `Passing` and `Seen` events. Layers outside of the row of blocks are not visited.

    In mode `sequential` two models run side by side, the original and the repaired one, and every group of layers
    is measured after the layers in front of it have been repaired. In mode `parallel` only the original runs, once.

    Layers named in `finished` are not yielded again; `weight_of` gives the weight [out, in] that they were repaired to.
    All others see the same as if the walk had not been broken off, to the last bit.

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
    ):
        self.plan, self.samples, self.device = plan, samples, device
        self.sequential = mode == "sequential"
        self.blocks = Blocks.of(plan, device)
        self.layers = {layer.target.name: layer for layer in plan.quantized}
        self.batch = batch_size(plan, samples)
        self.scratch = scratch
        self.finished, self.weight_of = frozenset(finished), weight_of
        self.repaired: nn.Module | None = None
        self.writes: dict[tuple[type, str], str | None] = {}
        self.diverged = False  # whether anything has been repaired yet

    def repair(self, layer: LayerPlan, weight: torch.Tensor) -> None:
        """Put `weight` [out, in] in the layer's place for all that follows."""
        self.diverged = True
        if self.repaired is not None:
            linear: Any = self.repaired.get_submodule(self._inner(layer.target.name))
            linear.weight.data = oriented(weight, layer)

    def __iter__(self) -> Iterator[Measuring | Passing | Seen]:
        open_blocks = [index for index in range(len(self.blocks)) if not self.finished.issuperset(self._names(index))]
        if not open_blocks:
            return
        with torch.no_grad(), tempfile.TemporaryDirectory(dir=self.scratch) as directory:
            batches = list(batches_of(self.samples, self.batch))
            original, calls = self._start(batches, Path(directory))
            repaired = original.twin(Path(directory)) if self.sequential else original
            for index in range(open_blocks[-1] + 1):
                self.index = index
                block = self.blocks.load(index)
                self.repaired = copy.deepcopy(block) if self.sequential else None
                try:
                    yield from self._block(block, original, repaired, calls, batches)
                    if index < open_blocks[-1]:
                        self._advance(original, block, calls, batches)
                        if self.repaired is not None:
                            self._advance(repaired, self.repaired, calls, batches)
                finally:
                    self.repaired = None
                    self.blocks.unload(index)

    def _block(
        self, block: nn.Module, original: Carried, repaired: Carried, calls: Calls, batches: list[Batch]
    ) -> Iterator[Measuring | Passing | Seen]:
        names = self._names(self.index)
        if not names:
            return
        if self.finished.issuperset(names):
            yield Passing(self.index, len(self.blocks))
        call, hidden = calls.of(batches[0], self.index), original.read(batches[0]).to(self.device)
        groups, unreached = self._groups(block, call, hidden, names)
        if self.sequential:
            for group in groups:
                if not self._finished(group.layers):
                    yield Measuring(self.index, len(self.blocks), tuple(layer.target.name for layer in group.layers))
                yield from self._measured(block, [group], original, repaired, calls, batches)
        elif groups:
            if not self.finished.issuperset(names):
                yield Measuring(self.index, len(self.blocks), tuple(names))
            yield from self._measured(block, groups, original, repaired, calls, batches)
        for layer in unreached:
            yield from self._given(block, layer, None)

    def _measured(
        self,
        block: nn.Module,
        groups: list[_Group],
        original: Carried,
        repaired: Carried,
        calls: Calls,
        batches: list[Batch],
    ) -> Iterator[Seen]:
        diverged = self.diverged and self.repaired is not None
        running = self.repaired if diverged else block
        assert running is not None
        meters = [Meter(group.layers, self.device, drift=diverged) for group in groups]
        wanted = {self._inner(layer.target.name) for group in groups for layer in group.layers}
        whole = diverged and any(w == "output" for group in groups for w in group.writes.values())
        finished = all(self._finished(group.layers) for group in groups)
        for batch in () if finished else batches:
            call = calls.of(batch, self.index)
            now = (repaired if diverged else original).read(batch).to(self.device)
            inputs, outputs, end = _run(running, call, now, wanted, whole)
            if diverged:
                then = original.read(batch).to(self.device)
                _, clean_outputs, clean_end = _run(block, call, then, wanted, whole)
            for group, meter in zip(groups, meters, strict=True):
                first = self._inner(group.layers[0].target.name)
                if first not in inputs:
                    continue
                x = self._tokens(inputs[first], batch, group.layers[0].target.name)
                differences: dict[str, torch.Tensor] = {}
                if diverged and len(_rows(inputs[first])) == len(_rows(now)):
                    for layer in group.layers:
                        inner, writes = self._inner(layer.target.name), group.writes.get(layer.target.name)
                        if inner not in clean_outputs or clean_outputs[inner].shape != outputs[inner].shape:
                            continue  # an expert that sees other tokens in the two models
                        difference = _rows(clean_outputs[inner] - outputs[inner])
                        if writes == "output":
                            difference = _rows(clean_end - end)
                        elif writes == "input":
                            difference += _rows(then - now)
                        differences[layer.target.name] = unpadded(difference, batch.mask)
                meter.add(x, differences)
        for group, meter in zip(groups, meters, strict=True):
            for layer in group.layers:
                yield from self._given(block, layer, meter.statistics(layer))

    def _given(self, block: nn.Module, layer: LayerPlan, statistics: Statistics | None) -> Iterator[Seen]:
        """Yield a layer to be solved, or repair one as it was before."""
        if layer.target.name not in self.finished:
            yield Seen(layer, self._weight(block, layer), statistics, self.repair if self.sequential else None)
        elif self.sequential:
            assert self.weight_of is not None
            self.repair(layer, self.weight_of(layer))

    def _finished(self, layers: list[LayerPlan]) -> bool:
        return all(layer.target.name in self.finished for layer in layers)

    def _names(self, index: int) -> list[str]:
        return [name for name in self.layers if name.startswith(self.blocks.prefix(index))]

    def _tokens(self, activation: torch.Tensor, batch: Batch, name: str) -> torch.Tensor:
        """Return the rows of tokens that are no padding; raises CalibrationError for NaN or Inf."""
        require_finite_input(activation, name, batch.start, self.samples)
        return unpadded(activation, batch.mask)

    def _groups(
        self, block: nn.Module, call: Call, hidden: torch.Tensor, names: list[str]
    ) -> tuple[list[_Group], list[LayerPlan]]:
        """Find, by running the block once, which layers share an input, in the order in which they run."""
        groups: list[_Group] = []
        seen: list[torch.Tensor] = []
        order: dict[str, torch.Tensor] = {}
        wanted = {self._inner(name): name for name in names}

        def keep(inner: str) -> Any:
            return lambda _module, args: _keep_first(order, inner, args[0])

        hooks = [block.get_submodule(inner).register_forward_pre_hook(keep(inner)) for inner in wanted]
        call(block, hidden)
        for hook in hooks:
            hook.remove()
        for inner, x in order.items():
            name = wanted[inner]
            shared = next((g for g, other in zip(groups, seen, strict=True) if other is x), None)
            if shared is None:
                shared = _Group([])
                groups.append(shared)
                seen.append(x)
            shared.layers.append(self.layers[name])
            if self.sequential and self.layers[name].target.module.out_features == hidden.shape[-1]:
                kind = (type(block), inner)
                if kind not in self.writes:
                    self.writes[kind] = _writes(block, block.get_submodule(inner), call, hidden)
                shared.writes[name] = self.writes[kind]
        return groups, [self.layers[name] for inner, name in wanted.items() if inner not in order]

    def _inner(self, name: str) -> str:
        return name.removeprefix(self.blocks.prefix(self.index))

    def _weight(self, block: nn.Module, layer: LayerPlan) -> torch.Tensor:
        linear: Any = block.get_submodule(self._inner(layer.target.name))
        return oriented(linear.weight.data, layer)

    def _start(self, batches: list[Batch], directory: Path) -> tuple[Carried, Calls]:
        calls = Calls()
        carried: Carried | None = None
        with self.blocks.surroundings():
            for batch in batches:
                hidden, found = self.blocks.calls(self.samples.tokens[batch.rows], batch.long_mask)
                calls.add(batch, found)
                if carried is None:
                    shape = (len(self.samples.tokens), *hidden.shape[1:])
                    carried = Carried(shape, directory / "original", streams=2 if self.sequential else 1)
                carried.write(batch, hidden)
        assert carried is not None
        return carried, calls

    def _advance(self, carried: Carried, block: nn.Module, calls: Calls, batches: list[Batch]) -> None:
        for batch in batches:
            carried.write(batch, calls.of(batch, self.index)(block, carried.read(batch).to(self.device)))
