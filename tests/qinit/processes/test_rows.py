from itertools import pairwise

import pytest
import torch

from qinit.processes.group import ALONE
from qinit.processes.rows import LEAST_ROWS, MOST_SHARDS, Rows
from tests.qinit.processes.together import together

CPU = torch.device("cpu")


class Other:
    """A process that knows its place among others, and does not talk to them."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count, self.several = rank, count, count > 1


@pytest.mark.parametrize("count", [1, LEAST_ROWS, 2 * LEAST_ROWS + 1, 3000, 100_000])
@pytest.mark.parametrize("processes", [1, 2, 3, 8, 20])
def test_every_row_is_in_one_shard_and_every_shard_is_one_process_s(count, processes):
    alone = Rows(count, CPU)
    assert alone.own == alone.shards
    assert (alone.shards[0].start, alone.shards[-1].stop) == (0, count)
    assert all(one.stop == other.start for one, other in pairwise(alone.shards))
    assert len(alone.shards) <= MOST_SHARDS
    shares = [Rows(count, CPU, Other(rank, processes)) for rank in range(processes)]
    assert all(share.shards == alone.shards for share in shares)
    if len(alone.shards) > 1:
        assert [shard for share in shares for shard in share.own] == alone.shards
    else:  # each does all of it, which takes no longer than to wait
        assert all(share.own == alone.shards for share in shares)


def test_shards_are_no_smaller_than_pays():
    assert all(shard.stop - shard.start >= LEAST_ROWS for shard in Rows(5 * LEAST_ROWS + 3, CPU).shards)


def test_a_gpu_takes_all_rows_at_once():
    assert Rows(4096, torch.device("cuda")).shards == [slice(0, 4096)]


def test_all_have_all_rows_at_the_end():
    count = 3 * LEAST_ROWS

    def do(processes):
        rows = Rows(count, CPU, processes)
        values, codes = torch.full((count, 2), -1.0), torch.zeros(count, dtype=torch.uint8)
        for shard in rows.own:
            values[shard], codes[shard] = float(processes.rank), 7
        rows.complete(values, codes)
        return values[:, 0].tolist(), codes.unique().tolist()

    first, second = together(2, do)
    assert first == second == ([0.0] * (2 * LEAST_ROWS) + [1.0] * LEAST_ROWS, [7])


def test_one_alone_has_all_rows():
    values = torch.arange(2 * LEAST_ROWS)
    Rows(len(values), CPU, ALONE).complete(values)
    assert values.equal(torch.arange(2 * LEAST_ROWS))
