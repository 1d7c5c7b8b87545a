"""Walks through a model block by block: measures what each layer sees, and lets later layers see the repair."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qinit.calibration.activations import (
    batch_size,
    caught,
    caught_at,
    put_weight,
    repairable,
    require_finite_input,
    rows_of,
    unpadded,
    weight_in,
)
from qinit.calibration.experts import ExpertMeters, caught_by_experts
from qinit.calibration.groups import Group, Groups
from qinit.calibration.kept_inputs import KeptInputs
from qinit.calibration.kinds import Kinds
from qinit.calibration.meter import Gap, Meter, Original
from qinit.calibration.seen import Seen
from qinit.calibration.shards import share_of
from qinit.calibration.states import Ends, States, in_front_of
from qinit.clock import counted, section
from qinit.events import Measuring, Passing
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.processes.group import ALONE, Processes
from qinit.stream.blocks import Blocks
from qinit.stream.carried import Batch
from qinit.stream.rows import Row, clear
from qinit.text.samples import Portion, Samples


class Walk:
    """Iterate to get every block that has layers, with its weights in memory and the text in front of it; once a block
    is done with, the text goes on through it. Rows of blocks follow each other: a decoder is measured on what the
    repaired encoder gives. Layers outside of the rows, and in rows that the text never reaches, are not visited.

    In mode `sequential` two models run side by side, the original and the repaired one, and every group of layers is
    measured after the layers in front of it have been repaired: the original block runs once, the repaired one as far
    as each group, and to its end for the last one. In mode `parallel` only the original runs, once.

    Layers named in `finished` are not yielded again; `weight_of` gives the weight [out, in] that they were repaired to.
    All others see the same as if the walk had not been broken off, to the last bit. With `whole_blocks` a block is
    finished only if all of its layers are.

    Of several `processes` each walks with its share of the text, and what layers see is added up over all. Each repairs
    every layer, whoever has solved it. `portion` is of what goes through the model at once.

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
        processes: Processes = ALONE,
        portion: Portion = int,
    ):
        share = share_of(samples.shortest_first(), portion(batch_size(plan, samples, device)), processes)
        self.samples, self.batches, self.device, self.processes = share.samples, share.batches, device, processes
        self.sequential = mode == "sequential"
        self.blocks = Blocks.of(plan, device)
        self.rows = self.blocks.rows
        self.count = sum(map(len, self.rows))
        self.layers = {layer.target.name: layer for layer in plan.quantized}
        self.scratch = scratch
        self.finished, self.weight_of, self.whole_blocks = frozenset(finished), weight_of, whole_blocks
        if whole_blocks:
            blocks = [self._names(row, index) for row in self.rows for index in range(len(row))]
            self.finished = frozenset(name for names in blocks if self.finished.issuperset(names) for name in names)
        self.kinds = Kinds(processes)
        self.diverged = False  # whether anything has been repaired yet

    def __iter__(self) -> Generator[OpenBlock, None, None]:
        open_rows = [row for row in self.rows if self._open_blocks(row)]
        if not open_rows:
            return
        with torch.no_grad(), tempfile.TemporaryDirectory(dir=self.scratch) as directory:
            self.directory = Path(directory)
            ends: list[Ends] = []
            first = 0  # the row's first block, counted through all rows
            for row in self.rows[: self.rows.index(open_rows[-1]) + 1]:
                states = in_front_of(
                    self.blocks, row, first, self.samples, self.batches, self.directory, ends, self.sequential
                )
                first += len(row)
                if states is None:
                    ends.append(Ends(None, None))
                    continue
                yield from self._through(row, states, to_its_end=row is not open_rows[-1])
                ends.append(Ends(states.original, states.repaired))

    def _through(self, row: Row, states: States, to_its_end: bool) -> Generator[OpenBlock, None, None]:
        """Yield the blocks of a row, and take the text through each; not through the last one that is open if nobody
        asks what is behind it."""
        last = len(row) - 1 if to_its_end else self._open_blocks(row)[-1]
        for index in range(last + 1):
            with section("reading"):
                module = row.load(index)
            states.index = index
            layers = self.layers.values()
            repaired = repairable(module, row.prefix(index), layers) if self.sequential else None
            block = OpenBlock(self, module, repaired, states)
            try:
                if block.names:
                    yield block
                if index < last or to_its_end:
                    if not block.passed:
                        block.run_original()
                    if self.sequential:
                        block.run_repaired()
                states.original, states.ahead = states.ahead, states.original
            finally:
                block.repaired = None
                row.unload(index)

    def visit(self) -> Iterator[Measuring | Passing | Seen]:
        """Yield the layers of all blocks, one block after the other."""
        with closing(iter(self)) as blocks:
            for block in blocks:
                yield from block.visit()

    def _names(self, row: Row, index: int) -> list[str]:
        return [name for name in self.layers if name.startswith(row.prefix(index))]

    def _open_blocks(self, row: Row) -> list[int]:
        return [index for index in range(len(row)) if not self.finished.issuperset(self._names(row, index))]


class OpenBlock:
    """A block of the walk: the original `module` with its weights, the `repaired` one (None in mode `parallel`), the
    text in front of both (`states`), and the names of the `layers` in it."""

    def __init__(self, walk: Walk, module: nn.Module, repaired: nn.Module | None, states: States) -> None:
        self.walk, self.module, self.repaired, self.states = walk, module, repaired, states
        self.prefix = states.row.prefix(states.index)
        self.names = walk._names(states.row, states.index)
        self.kind = states.first, type(module)
        layers = {self._inner(name): walk.layers[name] for name in self.names}
        self.groups = Groups(layers, partial(walk.kinds.of, self.kind))
        self.kept = KeptInputs(walk.directory / "shelf", walk.samples.tokens.numel(), walk.device)
        self.pools: dict[str, Meter] = {}  # what all experts of a parameter have seen together
        self.passed = False  # whether the text has run through the original module
        self.at_last = False  # whether it has run through the repaired one, all of it but for the last group repaired

    def repair(self, layer: LayerPlan, weight: torch.Tensor) -> None:
        """Put `weight` [out, in] in the layer's place for all that follows."""
        self.walk.diverged = True
        if self.repaired is not None:
            put_weight(self.repaired, self._inner(layer.target.name), layer, weight)

    def visit(self) -> Iterator[Measuring | Passing | Seen]:
        """Yield the block's layers with what they see, each to be solved and repaired before the next is asked for."""
        walk, index, count = self.walk, self.states.first + self.states.index, self.walk.count
        passing = walk.sequential or walk.finished.issuperset(self.names)
        yield Passing(index, count) if passing else Measuring(index, count, tuple(self.names))
        meters = self.run_original()
        for group in self.groups.found:
            if group.stack is not None:
                yield from self._visit_experts(group)
                continue
            if walk.sequential and not self._finished(group):
                yield Measuring(index, count, tuple(layer.target.name for layer in group.layers))
                meters[group.inner] = self._measured(group)
            yield from self._given(group.layers, meters.pop(group.inner, None))
        yield from self._given(self.groups.unreached, None)

    def _visit_experts(self, group: Group) -> Iterator[Measuring | Seen]:
        """Yield experts of one parameter, each with what its own tokens say and what those of all do."""
        meters = None
        if not self._finished(group):
            names = tuple(layer.target.name for layer in group.layers)
            yield Measuring(self.states.first + self.states.index, self.walk.count, names)
            meters = self._measured_experts(group)
        yield from self._given(group.layers, meters)

    @counted("forward")
    def _measured_experts(self, group: Group) -> ExpertMeters:
        """Take the text through the repaired block, in mode `parallel` through the original one, as far as the module
        of the experts of a group. What the two models send there is not compared: they may choose other experts."""
        walk, states = self.walk, self.states
        stack = group.stack
        assert stack is not None
        meters = ExpertMeters(group.layers, walk.device, self.pools.get(stack), walk.processes)
        module, carried = (self.module, states.original) if self.repaired is None else (self.repaired, states.repaired)
        for batch in states.batches:
            hidden = carried.read(batch).to(walk.device)
            found = caught_by_experts(module, states.calls.of(batch, states.index), hidden, stack)
            for inner, x in found.items():
                require_finite_input(x, self.prefix + inner, batch.start, walk.samples)
                meters.add(self.prefix + inner, x, batch.shard)
        meters.sum_up()
        self.pools[stack] = meters.pool
        return meters

    @counted("forward")
    def run_original(self) -> dict[str, Meter]:
        """Take the text through the original block, once: find its groups, in mode `parallel` measure them, and in mode
        `sequential` keep what they read."""
        walk, states = self.walk, self.states
        meters: dict[str, Meter] = {}
        self.passed = True
        if walk.sequential:
            hidden = states.original.read(states.probe).to(walk.device)
            walk.kinds.find(self.kind, self.module, self.groups.layers, states.probe_calls[states.index], hidden)
        done = walk.finished.issuperset(self.names)
        for batch in states.batches:
            call = states.calls.of(batch, states.index)
            hidden = states.original.read(batch).to(walk.device)
            inputs, end = caught(self.module, call, hidden, self.groups.layers)
            self.groups.add(inputs)
            if not done:
                for number, group in enumerate(self.groups.found):
                    x = None if group.stack is not None else inputs.get(group.inner)
                    if x is None:
                        continue
                    if walk.sequential:
                        if number and not group.at_end and not self._finished(group):
                            self.kept.put(self.groups, group, batch, x, inputs.get(group.added_to or ""))
                    elif not self._finished(group):
                        meter = meters.setdefault(group.inner, self._meter(group))
                        self._add(meter, group, batch, x)
            states.ahead.write(batch, end)
        if walk.processes.several:
            self.groups = self.groups.joined(walk.processes.gather(self.groups.names, "a block's groups"))
        if not walk.sequential:
            for group in self.groups.found:
                if group.stack is None and not self._finished(group):
                    meters.setdefault(group.inner, self._meter(group)).sum_up()
        return meters

    def _meter(self, group: Group, originals: dict[str, Original] | None = None) -> Meter:
        return Meter(group.layers, self.walk.device, originals, self.walk.processes)

    @counted("forward")
    def run_repaired(self) -> None:
        """Take the text through the repaired block."""
        states, last = self.states, self._last
        assert self.repaired is not None
        if last is None or not self.walk.diverged:
            for batch in states.batches:
                if self.walk.diverged:
                    call = states.repaired_calls.of(batch, states.index)
                    end = call(self.repaired, states.repaired.read(batch).to(self.walk.device))
                else:
                    end = states.ahead.read(batch)
                states.repaired.write(batch, end)
            return
        changes = [self._weight(layer, self.repaired) - self._weight(layer) for layer in last.layers]
        if not self.at_last:  # the block was finished before: its last group as it was when it was measured
            for layer in last.layers:
                self.repair(layer, self._weight(layer))
            for batch in states.batches:
                self._leave(last, batch, *self._through(last, batch))
        for batch in states.batches:
            end = states.repaired.read(batch).to(self.walk.device)
            x = self.kept.take(last, batch)
            if x is not None:
                x = rows_of(x).to(self.walk.device, torch.float32)
                for change in changes:
                    end = end + (x @ change.T).view_as(end)
            states.repaired.write(batch, end)

    @property
    def _last(self) -> Group | None:
        """The last group, if its layers write to the block's output and nothing else of the block is changed after
        them: what their repair changes there is then one product, and not another pass."""
        last = self.groups.found[-1] if self.groups.found else None
        return last if last is not None and last.at_end and not self.walk.whole_blocks else None

    def _through(self, group: Group, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run the repaired block to its end; return what a group reads, and the end."""
        states = self.states
        assert self.repaired is not None
        now = states.repaired.read(batch).to(self.walk.device)
        inputs, end = caught(self.repaired, states.repaired_calls.of(batch, states.index), now, [group.inner])
        return inputs.get(group.inner), end

    def _leave(self, last: Group, batch: Batch, x: torch.Tensor | None, end: torch.Tensor) -> None:
        """Keep where the text is once all but the last group is repaired."""
        self.at_last = True
        if x is not None:
            self.kept.put(self.groups, last, batch, x)
        self.states.repaired.write(batch, end)

    @counted("forward")
    def _measured(self, group: Group) -> Meter:
        """Take the text through the repaired block as far as a group, and measure it against the original."""
        walk, states, device = self.walk, self.states, self.walk.device
        diverged = walk.diverged
        assert self.repaired is not None
        originals = {
            layer.target.name: Original(self._weight(layer), group.writes[layer.target.name]) for layer in group.layers
        }
        meter = self._meter(group, originals if diverged else None)
        for batch in states.batches:
            now = states.repaired.read(batch).to(device)
            end = None
            start: torch.Tensor | None = now
            if diverged and any(kind == "output" for kind in group.writes.values()):
                x, end = self._through(group, batch)
            else:
                call, others = states.repaired_calls.of(batch, states.index), [group.reader] if group.reader else []
                inputs = caught_at(self.repaired, call, now, group.inner, others)
                x = inputs.get(group.inner)
                start = inputs.get(others[0]) if others else now
            if x is not None:
                self._add(meter, group, batch, x, self._gap(group, batch, x, start, end) if diverged else None)
            if group is self._last:
                self._leave(group, batch, x, states.ahead.read(batch) if end is None else end)
        if group is self._last:
            self._give_back(group)
        meter.sum_up()
        return meter

    def _give_back(self, last: Group) -> None:
        """Free all weights but those of the `last` group and of layers that the text never reaches: the block does not
        run again."""
        layers = *last.layers, *self.groups.unreached
        needed = {self._inner(layer.target.module.parameter) for layer in layers}
        for module in (self.module, self.repaired):
            assert module is not None
            clear(module, needed)

    def _gap(
        self, group: Group, batch: Batch, x: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None
    ) -> Gap | None:
        """Return how far the repaired model is from the original one, at a group's input `x`, at what its output is
        added to (`start`) and at the block's `end`; None where they cannot be compared, as where an expert sees other
        tokens in the two."""
        states, device = self.states, self.walk.device

        def apart(original: torch.Tensor, repaired: torch.Tensor) -> torch.Tensor:
            return unpadded(original.to(device) - repaired, batch.mask)

        then = states.original.read(batch)
        if len(rows_of(x)) != len(rows_of(then)):
            return None
        if group.at_end:
            assert end is not None
            return Gap(None, None, apart(states.ahead.read(batch), end))
        if group is self.groups.found[0]:
            call = states.calls.of(batch, states.index)
            clean = caught_at(self.module, call, then.to(device), group.inner).get(group.inner)
        else:
            clean = self.kept.take(group, batch)
        if clean is None or clean.shape != x.shape:
            return None
        before: torch.Tensor | None = then if group.added_to == "input" else None
        if group.reader:
            before = self.kept.take_start(group, batch)
        return Gap(
            apart(clean, x),
            None if before is None or start is None else apart(before, start),
            None if end is None else apart(states.ahead.read(batch), end),
        )

    def _add(self, meter: Meter, group: Group, batch: Batch, x: torch.Tensor, gap: Gap | None = None) -> None:
        require_finite_input(x, group.layers[0].target.name, batch.start, self.walk.samples)
        meter.add(unpadded(x, batch.mask), gap, batch.shard)

    def _given(self, layers: list[LayerPlan], meter: Meter | ExpertMeters | None) -> Iterator[Seen]:
        """Yield the layers of a group to be solved, and repair those that were finished before as they were."""
        walk = self.walk
        left = [layer for layer in layers if layer.target.name not in walk.finished]
        for layer in layers if walk.sequential else ():
            if layer.target.name in walk.finished:
                assert walk.weight_of is not None
                self.repair(layer, walk.weight_of(layer))
        for layer in left:
            measured = (lambda: None) if meter is None else partial(meter.statistics, layer)
            repair = self.repair if walk.sequential else None
            yield Seen(layer, self._weight(layer), measured, repair, last=layer is left[-1])

    def _weight(self, layer: LayerPlan, module: nn.Module | None = None) -> torch.Tensor:
        """Return a layer's weight [out, in] in the original block, or in another `module` of its kind."""
        return weight_in(self.module if module is None else module, self._inner(layer.target.name), layer)

    def _finished(self, group: Group) -> bool:
        return all(layer.target.name in self.walk.finished for layer in group.layers)

    def _inner(self, name: str) -> str:
        return name.removeprefix(self.prefix)
