"""A polish by several processes, and by one whose device has little room."""

import pickle

import pytest
import torch

import qinit.train.polish
from qinit.errors import FullError
from tests.qinit.processes.together import together
from tests.qinit.train.starts import polished, same, text

SIX = {"steps": 5, "batch_size": 6}
FULL = "polish: the memory of cpu is used up by a batch of"


@pytest.fixture
def at_once(monkeypatch):
    """Return a function that sets how many samples of 16 tokens go through at once."""
    return lambda count: monkeypatch.setattr("qinit.train.polish.MICRO_BYTES", count * 4 * 256 * 16)


def full_once(monkeypatch, skip=0, times=1):
    """Let the memory be used up at a pass, `skip` later than the first, so many times."""
    observed, passes = qinit.train.polish.observed, []

    def full(model, run):
        passes.append(model)
        if skip < len(passes) <= skip + times:
            raise torch.OutOfMemoryError("no room")
        return observed(model, run)

    monkeypatch.setattr("qinit.train.polish.observed", full)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_come_to_the_same(start, at_once, count):
    at_once(2)  # so that a step has 3 parts, and the text that is held out 2
    events, alone = polished(*start, text(17), **SIX)

    def do(processes):
        return pickle.dumps(polished(*start, text(17), **SIX, processes=processes))

    for found, result in map(pickle.loads, together(count, do)):
        assert found == events
        assert same(result, alone)
        assert (result.before, result.after) == (alone.before, alone.after)


def test_where_one_has_no_room_all_go_on_with_half_as_much(start, at_once, monkeypatch):
    def do(processes):
        if processes.rank:
            full_once(monkeypatch)
        return pickle.dumps(polished(*start, text(17), **SIX, processes=processes)[1])

    at_once(4)
    results = list(map(pickle.loads, together(2, do)))
    at_once(2)
    alone = polished(*start, text(17), **SIX)[1]
    for result in results:
        assert result.note == f"{FULL} 4, so it is done with 2 at once"
        assert same(result, alone)


def test_in_the_middle_of_a_step_too(start, at_once, monkeypatch):
    at_once(2)
    with monkeypatch.context() as patch:
        full_once(patch, skip=3)
        result = polished(*start, text(17), **SIX)[1]
    at_once(1)
    assert same(result, polished(*start, text(17), **SIX)[1])
    assert result.note == f"{FULL} 2, so it is done with 1 at once"


def test_no_room_for_one_sample_is_an_error(start, at_once, monkeypatch):
    at_once(1)
    full_once(monkeypatch, times=9)
    with pytest.raises(FullError, match=f"^{FULL} 1; give it shorter text"):
        polished(*start, **SIX)
