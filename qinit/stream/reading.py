"""A text read by a model of which one block at a time is in memory."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from qinit.stream.blocks import Blocks
from qinit.stream.carried import Batch, Calls, Carried


@torch.no_grad()
def read_through(
    blocks: Blocks, tokens: torch.Tensor, batches: Sequence[Batch], file: Path, streams: int = 1
) -> Generator[int, None, Carried]:
    """Carry the hidden states of `tokens` [samples, length] through all blocks; yield how many blocks are done, and
    return the states behind the last one. `file` holds them where memory is short, as one of `streams` such stores.

    Raises NotStreamable.
    """
    row, device = blocks.row, blocks.device
    calls, carried = Calls(), None
    with blocks.surroundings():
        for batch in batches:
            hidden, found = row.calls(tokens[batch.rows], batch.long_mask)
            calls.add(batch, found)
            if carried is None:
                carried = Carried((len(tokens), *hidden.shape[1:]), file, streams)
            carried.write(batch, hidden)
    assert carried is not None
    for index in range(len(row)):
        block = row.load(index)
        for batch in batches:
            carried.write(batch, calls.of(batch, index)(block, carried.read(batch).to(device)))
        row.unload(index)
        yield index + 1
    return carried
