import pytest
import torch

from qinit.calibration.shards import LEAST_TOKENS, SHARDS, SPARE, cut, share_of
from qinit.processes.group import Processes
from tests.helpers import padded, random_samples


@pytest.mark.parametrize(("samples", "shards"), [(64, 8), (24, 8), (5, 5), (1, 1)])
def test_equal_samples_are_cut_into_equal_shards(samples, shards):
    found = cut(random_samples(samples, LEAST_TOKENS))
    assert len(found) == shards <= SHARDS
    assert [place for part in found for place in part] == list(range(samples))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_short_text_is_one_shard_and_each_has_some_tokens():
    assert cut(random_samples(8, LEAST_TOKENS // 8)) == [range(8)]
    assert len(cut(random_samples(8, 3 * LEAST_TOKENS // 8))) == 3


def test_shards_of_samples_of_all_lengths_have_about_as_many_tokens():
    lengths = [*range(2, 130), *range(200, 260, 2)]
    samples = padded(random_samples(len(lengths), 260), lengths)
    found = cut(samples)
    tokens = [sum(lengths[part.start : part.stop]) for part in found]
    assert len(found) == SHARDS
    assert sum(tokens) == samples.count
    assert max(tokens) - min(tokens) < 2 * 260


def test_one_sample_that_is_nearly_all_of_it_leaves_no_shard_empty():
    assert all(cut(padded(random_samples(4, 2000), [1, 1, 2000, 1])))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("lengths", [None, [12, 300, 40, 150, 290, 300, 7, 200, 90, 300]])
def test_whoever_has_a_shard_reads_it_in_the_same_batches(count, lengths):
    samples = random_samples(10, 300)
    samples = samples if lengths is None else padded(samples, lengths).shortest_first()
    whole = share_of(samples, 3, Processes())
    numbers = [samples.number(place) for place in range(10)]
    wanted = [(one.shard, one.of(whole.samples.tokens), numbers[one.start : one.stop]) for one in whole.batches]
    found = []
    for rank in range(count):
        share = share_of(samples, 3, Processes(rank, count))
        for batch in share.batches:
            if batch.shard != SPARE:
                found.append((batch.shard, batch.of(share.samples.tokens)))
                found[-1] += ([share.samples.number(place) for place in range(batch.start, batch.stop)],)
    assert len(found) == len(wanted)
    for (shard, tokens, own), (number, expected, numbers) in zip(found, wanted, strict=True):
        assert (shard, own) == (number, numbers)
        assert torch.equal(tokens, expected)


def test_a_process_without_a_shard_reads_what_does_not_count():
    samples = random_samples(2, LEAST_TOKENS)
    shares = [share_of(samples, 4, Processes(rank, 3)) for rank in range(3)]
    assert [[batch.shard for batch in share.batches] for share in shares] == [[SPARE], [0], [1]]
