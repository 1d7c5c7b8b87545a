"""A device whose memory is used up: raised by hand, as the tests have no such device."""

from dataclasses import dataclass, field

import pytest
import torch

from qinit.calibration import walk, whole
from qinit.errors import FullError
from qinit.events import Noted
from qinit.processes.group import ALONE, Processes
from qinit.runner import layer
from qinit.runner.room import in_portions, moved
from qinit.solver.statistics import Statistics
from qinit.text import self_text
from tests.helpers import exhausted, quantize, weights_of
from tests.qinit.processes.together import together

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
FULL = torch.OutOfMemoryError("no room")
TEXT = {"calibration": "random", "calibration_samples": 16, "calibration_length": 32}


@dataclass
class Job:
    device: torch.device = DEVICE
    processes: Processes = ALONE
    spilled: list[str] = field(default_factory=list)

    def note(self, text):
        return Noted(text)


def full_the_first(times, function):
    """Return a function that is full so many times, and then as it was."""
    left = [times]

    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise FULL
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(("options", "layers"), [({}, 1), ({**TEXT, "iter": None}, 3)])
def test_a_layer_that_does_not_fit_is_solved_on_the_cpu(strong_llama, tmp_path, monkeypatch, options, layers):
    plain = quantize(strong_llama, tmp_path / "plain", **options)
    first = full_the_first(layers, layer.solve)
    tried = []

    def full(weight, *rest):
        tried.append(weight.data_ptr())
        return layer_solve(weight, *rest) if tried.count(weight.data_ptr()) > 1 else first(weight, *rest)

    layer_solve = layer.solve
    monkeypatch.setattr(layer, "solve", full)
    report = quantize(strong_llama, tmp_path / "out", **options)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    (note,) = set(report.notes) - set(plain.notes)
    others = " and 2 others" if layers > 1 else ""
    assert note.startswith("model.layers.0.") or note.startswith("model.layers.1.")
    assert note.endswith(f"{others} did not fit into the device's memory; solved on the CPU")


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_calibration_goes_on_with_half_a_batch(strong_llama, tmp_path, monkeypatch, mode):
    options = {**TEXT, "calibration_mode": mode}
    small = monkeypatch.context()
    with small as patch:
        patch.setattr(walk, "batch_size", lambda *_: 1)
        plain = quantize(strong_llama, tmp_path / "small", **options)
    monkeypatch.setattr(walk, "batch_size", lambda *_: 4)

    def caught(block, call, hidden, wanted):
        if len(hidden) > 1:
            raise FULL
        return run(block, call, hidden, wanted)

    run = walk.caught
    monkeypatch.setattr(walk, "caught", caught)
    report = quantize(strong_llama, tmp_path / "out", **options)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "small")
    full = "calibration: the memory of cpu is used up by a batch of"
    assert report.notes == (*(f"{full} {2 * n}, so it is done with {n} at once" for n in (2, 1)), *plain.notes)


def test_text_is_written_in_smaller_batches_on_the_device_or_the_cpu(strong_llama, tmp_path, monkeypatch):
    tried = []
    sample = self_text._sample

    def full(model, start, count, length):
        tried.append(count)
        if count > 1:
            raise FULL
        return sample(model, start, count, length)

    monkeypatch.setattr(self_text, "_sample", full)
    options = {**TEXT, "calibration": "self", "calibration_samples": 2, "calibration_mode": "parallel"}
    report = quantize(strong_llama, tmp_path / "out", **options)
    assert tried == [2, 1, 1]
    assert "the text: the memory of cpu is used up by a batch of 2, so it is done with 1 at once" in report.notes


def test_so_does_a_model_that_is_taken_whole(strong_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "batch_size", lambda *_: 2)
    monkeypatch.setattr(whole, "read_tokens", full_the_first(1, whole.read_tokens))
    report = quantize(strong_llama, tmp_path / "out", method="lq-lora", format="dense", **TEXT)
    assert "calibration: the memory of cpu is used up by a batch of 2, so it is done with 1 at once" in report.notes


def test_a_pass_back_that_has_no_room_and_nothing_left_to_try(strong_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("qinit.calibration.probe.Probe.loss", full_the_first(99, None))
    message = "^the pass back: the memory of cpu is used up by a batch of 1; give the run more memory, or shorter texts"
    with pytest.raises(FullError, match=message):
        quantize(strong_llama, tmp_path / "out", **TEXT, iter=None)
    assert not (tmp_path / "out").exists()


def attempt(job, room, seen):
    def do(portion):
        size = portion(6)
        seen.append((job.device.type, size))
        if size > room.get(job.device.type, 9):
            raise FULL
        job.processes.gather(size, "what all do")
        yield Noted("at work")
        return size

    return do


def test_what_has_no_room_for_one_goes_on_on_the_cpu():
    job, seen = Job(), []
    found, events = exhausted(in_portions(job, "this", attempt(job, {"meta": 0}, seen)))
    assert seen == [("meta", 6), ("meta", 3), ("meta", 1), ("cpu", 6)]
    assert (found, job.device) == (6, CPU)
    assert events[2].text == (
        "this: the memory of meta is used up by a batch of 1, so that and all that follows is done on the CPU"
    )


def test_where_one_process_has_no_room_all_make_do_with_less():
    def do(processes):
        job, seen = Job(processes=processes), []
        found, events = exhausted(in_portions(job, "this", attempt(job, {"meta": 6 - 3 * processes.rank}, seen)))
        return found, seen, [event.text for event in events], processes.gather(processes.rank, "and then")

    results = together(2, do)
    assert results[0] == results[1]
    assert results[0][:2] == (3, [("meta", 6), ("meta", 3)])
    assert results[0][3] == [0, 1]


def test_what_a_layer_has_seen_is_moved_as_a_whole():
    found = moved(Statistics(torch.ones(2, 2), torch.ones(2), 3), DEVICE)
    assert (found.hessian.device, found.magnitude.device, found.tokens, found.drift) == (DEVICE, DEVICE, 3, None)
    assert moved(None, DEVICE) is None
