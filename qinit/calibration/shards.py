"""The text in shards: a fixed number of them, each summed alone, so that sums are the same whoever has which."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from qinit.processes.group import Processes
from qinit.stream.carried import Batch, batches_of
from qinit.text.samples import Samples

SHARDS = 8
LEAST_TOKENS = 256  # of a shard: a text of a few sentences is not cut
SPARE = -1  # stands for no shard: text that goes along and does not count


@dataclass(frozen=True)
class Share:
    """The part of a text that a process reads: its samples and their batches, each in one shard."""

    samples: Samples
    batches: list[Batch]


def share_of(samples: Samples, size: int, processes: Processes) -> Share:
    """Return the shards of this process, some that follow each other, in batches of up to `size` samples. A process for
    which there is none reads the first sample, as SPARE."""
    shards = cut(samples)
    per_process = [len(shards) * rank // processes.count for rank in range(processes.count + 1)]
    mine = range(per_process[processes.rank], per_process[processes.rank + 1])
    if not mine:
        own = _part(samples, range(1))
        return Share(own, list(batches_of(own, 1, SPARE)))
    first, last = shards[mine[0]].start, shards[mine[-1]].stop
    own = _part(samples, range(first, last))
    parts = ((number, range(shards[number].start - first, shards[number].stop - first)) for number in mine)
    return Share(own, [batch for number, part in parts for batch in batches_of(own, size, number, part)])


def cut(samples: Samples) -> list[range]:
    """Cut samples into shards that follow each other, with about as many tokens in each: SHARDS of them, or as many as
    have a sample and LEAST_TOKENS each. It depends on the samples alone."""
    total = len(samples.tokens)
    count = max(1, min(SHARDS, total, samples.count // LEAST_TOKENS))
    each = torch.full((total,), samples.tokens.shape[1]) if samples.mask is None else samples.mask.sum(1)
    so_far = each.cumsum(0)
    ends = [0]
    for number in range(1, count):
        end = int(torch.searchsorted(so_far, samples.count * number // count)) + 1
        ends.append(min(max(end, ends[-1] + 1), total - count + number))
    ends.append(total)
    return [range(start, stop) for start, stop in pairwise(ends)]


def _part(samples: Samples, part: range) -> Samples:
    if len(part) == len(samples.tokens):
        return samples
    rows = slice(part.start, part.stop)
    mask = None if samples.mask is None else samples.mask[rows]
    return Samples(samples.tokens[rows], mask, samples.origin, tuple(samples.number(place) for place in part))
