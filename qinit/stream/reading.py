"""A text read by a model of which one block at a time is in memory."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from qinit.stream.blocks import Blocks
from qinit.stream.calls import NotStreamable
from qinit.stream.carried import Batch, Carried
from qinit.stream.front import in_front


@torch.no_grad()
def read_through(
    blocks: Blocks, tokens: torch.Tensor, batches: Sequence[Batch], file: Path, streams: int = 1
) -> Generator[int, None, list[Carried | None]]:
    """Carry the hidden states of `tokens` [samples, length] through all blocks; yield how many blocks are done, and
    return the states behind each row of blocks, None for one that the text never reaches. `file` holds the first row's
    where memory is short, and files beside it the others', as one of `streams` such stores.

    Raises NotStreamable.
    """
    ends: list[Carried | None] = []
    done = 0
    for number, row in enumerate(blocks.rows):
        place = file.with_name(f"{file.name}-row{number}") if number else file
        front = in_front(blocks, row, tokens, batches, place, streams, ends)
        ends.append(None if front is None else front.hidden)
        for index in range(len(row)):
            if front is not None:
                block = row.load(index)
                for batch in batches:
                    hidden = front.hidden.read(batch).to(blocks.device)
                    front.hidden.write(batch, front.calls.of(batch, index)(block, hidden))
                row.unload(index)
            done += 1
            yield done
    if ends[-1] is None:
        raise NotStreamable("the model never calls its last blocks")
    return ends
