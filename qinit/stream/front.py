"""The text in front of a row of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qinit.stream.blocks import Blocks
from qinit.stream.calls import Call
from qinit.stream.carried import Batch, Calls, Carried
from qinit.stream.rows import Row


@dataclass(frozen=True)
class Front:
    """The hidden states in front of a row's first block, and how each of its blocks is called; and how with one sample,
    the `probe`, where one was given."""

    hidden: Carried
    calls: Calls
    probe: list[Call]


@torch.no_grad()
def in_front(
    blocks: Blocks,
    row: Row,
    tokens: torch.Tensor,
    batches: Sequence[Batch],
    file: Path,
    streams: int,
    ends: Sequence[Carried | None] = (),
    probe: Batch | None = None,
) -> Front | None:
    """Take `tokens` [samples, length] as far as a row of blocks; `ends` has the hidden states behind each row before,
    None for one that the text never reaches. Returns None where it never reaches this one.

    The states are kept in `file` where memory is short, as one of `streams` such stores. Raises NotStreamable.
    """
    calls, hidden = Calls(blocks.device), None

    def store(value: torch.Tensor, name: str) -> Carried:
        return Carried((*tokens.shape, *value.shape[2:]), file.with_name(name), streams, blocks.device)

    with blocks.surroundings():
        for batch in batches:
            start = row.start(batch.of(tokens), batch.long_mask, ends_of(batch, ends, blocks.device))
            if start is None:
                return None
            calls.add(batch, start.calls)
            if hidden is None:
                hidden = store(start.hidden, file.name)
                calls.made = [store(value, f"{file.name}-{i}") for i, value in enumerate(start.made)]
            hidden.write(batch, start.hidden)
            for states, value in zip(calls.made, start.made, strict=True):
                states.write(batch, value)
        probes = []
        if probe is not None:
            start = row.start(probe.of(tokens), probe.long_mask, ends_of(probe, ends, blocks.device))
            assert start is not None
            made = [value.detach() for value in start.made]
            probes = [call.filled(made) for call in start.calls]
    row.unload(0)  # it may have been run
    assert hidden is not None
    return Front(hidden, calls, probes)


def ends_of(batch: Batch, ends: Sequence[Carried | None], device: torch.device) -> list[torch.Tensor | None]:
    """Return the states of a batch behind each row, ready to take a gradient."""
    return [None if states is None else states.read(batch).to(device, copy=True).requires_grad_() for states in ends]
