"""A pass forward and a pass back, block by block: the gradients at the outputs of all layers, and what enters them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qinit.calibration.probe import OverflowedError, Part, Probe
from qinit.events import Measuring
from qinit.machine import fast_products
from qinit.stream.blocks import Blocks
from qinit.stream.calls import NotStreamable
from qinit.stream.carried import Batch, Calls, Carried
from qinit.stream.front import ends_of, in_front
from qinit.stream.rows import Row
from qinit.stream.whole import load_whole, read_tokens


def backward(make: Callable[[], Any], scratch: Path | None) -> Generator[Measuring, None, Any]:
    """Take the text of a Probe that `make` makes forward and back; yields Measuring, returns the Probe.

    The pass forward keeps what enters each block, the pass back takes the blocks in reverse, so that one block is in
    memory at a time. A model that is no rows of blocks is taken whole. Raises OverflowedError where the model's output
    is no number, CalibrationError and CheckpointError.
    """
    probe = make()
    try:
        yield from _streamed(Blocks.of(probe.plan, probe.device), probe, scratch)
    except NotStreamable:
        probe = make()
        yield from _whole(probe)
    return probe


def _streamed(blocks: Blocks, probe: Probe, scratch: Path | None) -> Iterator[Measuring]:
    count = sum(map(len, blocks.rows))
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        blocks.require_whole()
        paths = tuple(row.path + "." for row in blocks.rows)
        probe.outside = [layer for name, layer in probe.layers.items() if not name.startswith(paths)]
        yield Measuring(0, count, tuple(probe.layers))
        passes: list[_Pass] = []
        for number, row in enumerate(blocks.rows):
            place = Path(directory) / str(number)
            place.mkdir()
            passes.append(_Pass(blocks, row, probe, place, count + 1 + len(blocks.rows)))
            passes[-1].forward([one.end for one in passes[:-1]])
        _through_the_end(blocks, probe, passes)
        for number in reversed(range(len(passes))):
            done = sum(len(one.row) for one in passes[:number])
            yield from passes[number].back(passes[:number], done, count)


def _agreed(probe: Probe, action: Callable[[], None]) -> None:
    """Do what may overflow; where it does in one process, raise OverflowedError in all of them."""
    overflow = ""
    try:
        action()
    except OverflowedError as error:
        overflow = str(error)
    found = [where for where in probe.processes.gather(overflow, "overflows") if where]
    if found:
        raise OverflowedError(found[0])


def _through_the_end(blocks: Blocks, probe: Probe, passes: Sequence[_Pass]) -> None:
    """Take the loss back to the output of each row of blocks."""
    states = [one.end for one in passes]

    def end(batch: Batch, ends: list[torch.Tensor | None] | None = None) -> Any:
        ends = ends_of(batch, states, probe.device) if ends is None else ends
        return blocks.after(batch.of(probe.samples.tokens), batch.long_mask, ends)

    with blocks.surroundings(head=True):
        part = Part(blocks.model, "", probe.outside)
        with torch.no_grad():
            probe.prepare(part, end)

        def back() -> None:
            with probe.listening(part), torch.enable_grad():
                for batch in probe.batches:
                    probe.turn_to(batch)
                    ends = ends_of(batch, states, probe.device)
                    probe.loss(end(batch, ends)).backward()
                    for one, hidden in zip(passes, ends, strict=True):
                        if one.gradient is not None and hidden is not None:
                            one.gradient.write(batch, _gradient(hidden))

        _agreed(probe, back)
        probe.done(part)


class _Pass:
    """A row of blocks on the way forward and back: `end` has the states behind its last block, and `gradient` is at the
    output of the block that is next; both None for a row that the text never reaches."""

    def __init__(self, blocks: Blocks, row: Row, probe: Probe, place: Path, streams: int) -> None:
        self.blocks, self.row, self.probe, self.place, self.streams = blocks, row, probe, place, streams
        self.states: list[Carried] = []
        self.end: Carried | None = None
        self.gradient: Carried | None = None
        self.calls = Calls(probe.device)

    @torch.no_grad()
    def forward(self, before: Sequence[Carried | None]) -> None:
        """Keep what enters each block, given the states behind the rows before."""
        probe = self.probe
        file = self.place / "0"
        front = in_front(self.blocks, self.row, probe.samples.tokens, probe.batches, file, self.streams, before)
        if front is None:
            return
        self.calls = front.calls
        shape = tuple(front.hidden.states.shape)
        later = [Carried(shape, self.place / str(i + 1), self.streams, probe.device) for i in range(len(self.row))]
        self.states = [front.hidden, *later]
        for index in range(len(self.row)):
            block = self.row.load(index)
            for batch in probe.batches:
                output = self.calls.of(batch, index)(block, self.states[index].read(batch).to(probe.device))
                self.states[index + 1].write(batch, output)
            self.row.unload(index)
        self.end = self.states[-1]
        # Behind the last row nobody asks for the states again.
        last = self.row is self.blocks.rows[-1]
        self.gradient = self.end if last else Carried(shape, self.place / "gradient", self.streams, probe.device)

    def back(self, before: Sequence[_Pass], done: int, count: int) -> Iterator[Measuring]:
        """Take the gradient back through the blocks, and on to the ends of the rows before, where these are read;
        `done` of `count` blocks lie before this row."""
        if self.gradient is None:
            return
        row, probe, device = self.row, self.probe, self.probe.device
        made = [_zeros(states, self.streams) for states in self.calls.made]  # gradients at what the slots stand for
        for index in reversed(range(len(row))):
            prefix = row.prefix(index)
            inside = [layer for name, layer in probe.layers.items() if name.startswith(prefix)]
            yield Measuring(done + index, count, tuple(layer.target.name for layer in inside))
            block = row.load(index)
            part = Part(block, prefix, inside)

            def run(
                batch: Batch,
                block: nn.Module = block,
                index: int = index,
                hidden: torch.Tensor | None = None,
                given: list[torch.Tensor] | None = None,
            ) -> torch.Tensor:
                x = self.states[index].read(batch).to(device) if hidden is None else hidden
                return self.calls.of(batch, index, given)(block, x)

            with torch.no_grad():
                probe.prepare(part, run)
            with probe.listening(part), torch.enable_grad():
                for batch in probe.batches:
                    probe.turn_to(batch)
                    hidden = self.states[index].read(batch).to(device, copy=True).requires_grad_()
                    given = [value.clone().requires_grad_() for value in self.calls.read(batch)]
                    output, gradient = run(batch, hidden=hidden, given=given), self.gradient.read(batch).to(device)
                    with fast_products(device):
                        output.backward(gradient)
                    self.gradient.write(batch, _gradient(hidden))
                    for total, value in zip(made, given, strict=True):
                        total.write(batch, total.read(batch).to(device) + _gradient(value))
            probe.done(part)
            row.unload(index)
        if made or any(one.end is not None for one in before):
            self._hand_over(before, made)

    def _hand_over(self, before: Sequence[_Pass], made: Sequence[Carried]) -> None:
        """Add to the gradients at the ends of the rows before what arrives there from this one."""
        device, gradient = self.probe.device, self.gradient
        assert gradient is not None
        with self.blocks.surroundings():
            for batch in self.probe.batches:
                ends = ends_of(batch, [one.end for one in before], device)
                start = self.row.start(batch.of(self.probe.samples.tokens), batch.long_mask, ends)
                assert start is not None
                pairs = [(start.hidden, gradient), *zip(start.made, made, strict=True)]
                pairs = [(value, states) for value, states in pairs if value.requires_grad]
                if pairs:
                    torch.autograd.backward(
                        [value for value, _ in pairs], [states.read(batch).to(device) for _, states in pairs]
                    )
                for one, hidden in zip(before, ends, strict=True):
                    if one.gradient is not None and hidden is not None:
                        one.gradient.write(batch, one.gradient.read(batch).to(device) + _gradient(hidden))
        self.row.unload(0)


def _zeros(states: Carried, streams: int) -> Carried:
    other = Carried(
        tuple(states.states.shape), states.file.with_name(f"{states.file.name}-gradient"), streams, states.device
    )
    other.states.zero_()
    return other


def _gradient(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(hidden) if hidden.grad is None else hidden.grad


def _whole(probe: Probe) -> Iterator[Measuring]:
    plan, samples, device = probe.plan, probe.samples, probe.device
    model = load_whole(plan).to(device).requires_grad_(False)
    yield Measuring(0, 1, tuple(probe.layers))
    part = Part(model, "", list(probe.layers.values()))

    def run(batch: Batch) -> Any:
        mask = None if batch.mask is None else batch.mask.to(device)
        return read_tokens(model, batch.of(samples.tokens).to(device), mask, plan)

    with torch.no_grad():
        probe.prepare(part, run)

    def back() -> None:
        with probe.listening(part), torch.enable_grad():
            for batch in probe.batches:
                probe.turn_to(batch)
                probe.loss(run(batch)).backward()

    _agreed(probe, back)
    probe.done(part)
