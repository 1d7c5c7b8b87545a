"""The rows of one layer, computed by several processes."""

from __future__ import annotations

from itertools import pairwise

import torch

from qinit.processes.group import ALONE, Processes

MOST_SHARDS = 8
LEAST_ROWS = 256  # of a shard: products of fewer are slow


class Rows:
    """The rows of matrices [count, ...], cut into shards: the same for any number of processes, so that what is made of
    a shard is the same to the last bit, whoever makes it. `own` are those of this process. A GPU takes all rows at
    once. Where there is one shard every process makes it, as it would have to wait for it otherwise.
    """

    def __init__(self, count: int, device: torch.device, processes: Processes = ALONE) -> None:
        shards = max(1, min(MOST_SHARDS, count // LEAST_ROWS)) if device.type == "cpu" else 1
        ends = [count * number // shards for number in range(shards + 1)]
        self.shards = [slice(*pair) for pair in pairwise(ends)]
        self._processes = processes if shards > 1 else ALONE
        self._owners = [number * processes.count // shards for number in range(shards)]
        mine = (owner == processes.rank or not self._processes.several for owner in self._owners)
        self.own = [shard for shard, own in zip(self.shards, mine, strict=True) if own]

    def complete(self, *matrices: torch.Tensor) -> None:
        """Give all processes all rows of matrices, in place, of which each has made its own."""
        if self._processes.several:
            parts = [matrix[shard] for matrix in matrices for shard in self.shards]
            self._processes.spread(parts, self._owners * len(matrices), "rows of a layer")
