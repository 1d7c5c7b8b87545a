import errno
import os

import pytest
import torch

from qinit.machine import CPU
from qinit.stream import carried as module
from qinit.stream.calls import Call
from qinit.stream.carried import Batch, Calls, Carried, batches_of, place_for
from tests.helpers import gauss, padded, random_samples


@pytest.mark.parametrize(("size", "starts"), [(1, list(range(7))), (3, [0, 3, 6]), (7, [0]), (100, [0])])
def test_batches_are_all_samples_in_their_order(size, starts):
    samples = padded(random_samples(7), [12, 5, 9, 12, 2, 7, 8])
    batches = list(batches_of(samples, size))
    assert [batch.start for batch in batches] == starts
    for batch in batches:
        longest = max([12, 5, 9, 12, 2, 7, 8][batch.rows])  # what lies behind it is padding for all
        assert torch.equal(batch.of(samples.tokens), samples.tokens[batch.rows, :longest])
        assert torch.equal(batch.mask, samples.mask[batch.rows, :longest])
        assert torch.equal(batch.long_mask, batch.mask.long())
    assert sum(batch.stop - batch.start for batch in batches) == 7
    assert all(batch.mask is batch.long_mask is None for batch in batches_of(random_samples(7), size))


class TestCalls:
    def calls(self, position, mask=None):
        """How two blocks are called: with hidden states, which are left out, a tensor and a mask."""
        return [Call((torch.empty(0),), {"position": torch.tensor(position), "mask": mask, "n": n}) for n in range(2)]

    def test_one_that_is_alike_for_all_batches_of_a_size_is_kept_once(self):
        found = Calls(torch.device("cpu"))
        first, again, short = self.calls([0, 1]), self.calls([0, 1]), self.calls([0])
        for batch, calls in ((Batch(0, 3, None), first), (Batch(3, 6, None), again), (Batch(6, 7, None), short)):
            found.add(batch, calls)
        assert [found.of(Batch(3, 6, None), index) for index in range(2)] == first
        assert found.of(Batch(6, 7, None), 1) is short[1]
        assert not found.own

    def test_a_batch_that_is_called_otherwise_has_its_own(self):
        found = Calls(torch.device("cpu"))
        first, other = self.calls([0, 1]), self.calls([0, 1], mask=torch.ones(1))
        found.add(Batch(0, 3, None), first)
        found.add(Batch(3, 6, None), other)
        assert found.of(Batch(0, 3, None), 0) is first[0]
        assert found.of(Batch(3, 6, None), 1) is other[1]


@pytest.fixture(params=["memory", "disk"])
def room(request, monkeypatch):
    monkeypatch.setattr(module, "CARRIED_SHARE", 0.25 if request.param == "memory" else 0)
    return request.param


class TestCarried:
    def test_what_is_written_is_read_and_a_twin_goes_its_own_way(self, tmp_path, room):
        states = gauss(7, 12, 4)
        store = Carried((7, 12, 4), tmp_path / "original", 2, CPU)
        for batch in batches_of(random_samples(7), 3):
            store.write(batch, states[batch.rows])
        twin = store.twin("repaired")
        twin.write(Batch(0, 2, None), torch.zeros(2, 12, 4))
        assert torch.equal(store.read(Batch(0, 7, None)), states)
        assert torch.equal(twin.read(Batch(2, 7, None)), states[2:])
        assert not twin.read(Batch(0, 2, None)).any()
        files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        assert files == ({} if room == "memory" else dict.fromkeys(("original", "repaired"), 4 * 7 * 12 * 4))

    def test_all_streams_together_have_to_fit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "free_memory", lambda device: 4 * 4 * 1000)
        assert place_for(4000, CPU) == CPU
        assert place_for(4001, CPU) is None
        for streams, files in ((1, []), (2, ["two"])):
            Carried((1000,), tmp_path / ("one" if streams == 1 else "two"), streams, CPU)
            assert [path.name for path in tmp_path.iterdir()] == files

    @pytest.mark.parametrize(("size", "place"), [(100, "cuda"), (101, "cpu"), (1001, None)])
    def test_the_device_comes_before_memory_and_memory_before_the_disk(self, size, place, monkeypatch):
        monkeypatch.setattr(module, "free_memory", lambda device: {"cuda": 400, "cpu": 4000}[device.type])
        assert place_for(size, torch.device("cuda")) == (place and torch.device(place))

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_an_error_at_once_and_not_the_end_of_the_process(self, tmp_path, monkeypatch, number):
        def full(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module, "CARRIED_SHARE", 0)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=os.strerror(number)):
            Carried((10,), tmp_path / "states", 1, CPU)

    def test_a_file_system_that_promises_nothing_is_written_to_all_the_same(self, tmp_path, monkeypatch):
        def cannot(*_):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(module, "CARRIED_SHARE", 0)
        monkeypatch.setattr(os, "posix_fallocate", cannot)
        store = Carried((10, 2), tmp_path / "states", 1, CPU)
        store.write(Batch(0, 10, None), torch.ones(10, 2))
        assert store.read(Batch(0, 10, None)).all()
