"""The text in front of a block, in the original model and in the repaired one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qinit.clock import counted
from qinit.stream.blocks import Blocks
from qinit.stream.calls import Call
from qinit.stream.carried import Batch, Calls, Carried, batches_of
from qinit.stream.front import Front, in_front
from qinit.stream.rows import Row
from qinit.text.samples import Samples


@dataclass(frozen=True)
class Ends:
    """The hidden states behind a row of blocks, of the original and the repaired model; None: it is not reached."""

    original: Carried | None
    repaired: Carried | None


@dataclass
class States:
    """The text in front of block `index` of a row whose first block is the `first` of all: the hidden states of both
    models, in batches, and how the block is called with each of them; the same with one sample, for experiments.
    `ahead` takes what the original block makes of it."""

    row: Row
    first: int
    batches: list[Batch]
    calls: Calls
    repaired_calls: Calls
    original: Carried
    repaired: Carried
    ahead: Carried
    probe: Batch
    probe_calls: list[Call]
    index: int = 0


@counted("forward")
def in_front_of(
    blocks: Blocks,
    row: Row,
    first: int,
    samples: Samples,
    batches: list[Batch],
    directory: Path,
    ends: Sequence[Ends],
    sequential: bool,
) -> States | None:
    """Take the text, a batch at a time, as far as a row of blocks; `ends` has what is behind the rows before.
    Both models are one unless `sequential`. None: the text never gets there. Raises NotStreamable."""
    tokens = samples.tokens
    streams = (3 if sequential else 1) * (2 * len(blocks.rows) - 1)

    def front(name: str, behind: Sequence[Carried | None], probe: Batch | None = None) -> Front | None:
        return in_front(blocks, row, tokens, batches, directory / f"{name}-{first}", streams, behind, probe)

    probe = next(batches_of(samples, 1))
    found = front("original", [one.original for one in ends], probe)
    if found is None:
        return None
    original = repaired = ahead = found.hidden
    calls = repaired_calls = found.calls
    if sequential:
        ahead = original.twin(f"ahead-{first}")
        if any(one.repaired is not None for one in ends):
            again = front("repaired", [one.repaired for one in ends])
            assert again is not None
            repaired, repaired_calls = again.hidden, again.calls
        else:
            repaired = original.twin(f"repaired-{first}")
    return States(row, first, batches, calls, repaired_calls, original, repaired, ahead, probe, found.probe)
