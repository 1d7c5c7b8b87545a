from threading import Thread

import pytest
from torch.distributed import HashStore

from qinit.processes import meeting
from qinit.processes.meeting import meeting_place


def met(store, count):
    """Let `count` processes, here threads, meet; return each one's place."""
    found = {}
    threads = [
        Thread(target=lambda rank=rank: found.update({rank: meeting_place(store, rank, count)}))
        for rank in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(count)]


def test_all_meet_at_one_place_and_a_later_attempt_at_another():
    store = HashStore()
    store.set("hello 1", "of a dead process")
    for attempt in range(2):
        first, *others = met(store, 3)
        assert not first.check(["said"])  # by the attempt before
        first.set("said", str(attempt))
        assert all(other.get("said") == str(attempt).encode() for other in others)


@pytest.mark.parametrize(("rank", "why"), [(0, "process 1 has not come"), (1, "the first process does not answer")])
def test_nobody_waits_for_ever(rank, why, monkeypatch):
    monkeypatch.setattr(meeting, "LONGEST", 0.0)
    with pytest.raises(RuntimeError, match=f"^{why}$"):
        meeting_place(HashStore(), rank, 2)
