"""A run that is broken off goes on where it was, and ends with the same bytes as one that never was."""

import os
import random
import shutil

import pytest

from qinit.events import Done, Finished, Passing, Resumed, Sampling
from qinit.runner import layer as layer_module
from qinit.workplace.journal import finished_layers, read_journal
from qinit.workplace.place import partial_of
from tests.broken_off import RANDOM, RUNS, TEXT, Crash, finish, result_in, start, undisturbed
from tests.helpers import names
from tests.models import ENTANGLED, make_checkpoint, make_float32

KILLS = 4


@pytest.fixture
def torn(monkeypatch):
    """Let a line of the journal be torn, and the run crash there: at the layer of this number in each session."""
    real, state = os.write, {"layers": 0, "at": 0}

    def write(descriptor, data):
        if b'"kind": "layer"' in bytes(data):
            state["layers"] += 1
            if state["layers"] == state["at"]:
                real(descriptor, bytes(data)[: len(data) // 2])
                raise Crash
        return real(descriptor, data)

    monkeypatch.setattr("qinit.workplace.journal.os.write", write)

    def at(number):
        state.update(layers=0, at=number)

    return at


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_crashes_again_and_again_ends_with_the_same_bytes(kind, strong_llama, place, torn):
    """Each session finishes three layers and dies while it notes the fourth one down: between groups of layers that
    are measured together, and within them."""
    options = RUNS[kind]
    wanted = undisturbed(strong_llama, place, **options)
    for session in range(1, 5):
        torn(4)
        with pytest.raises(Crash):
            finish(strong_llama, place / "out", **options)
        assert not (place / "out").exists()
        assert len(finished_layers(read_journal(partial_of(place / "out") / "journal"))) == 3 * session
    torn(0)
    events = finish(strong_llama, place / "out", **options)
    assert isinstance(events[0], Resumed)
    assert events[0].layers == 12
    assert len([event for event in events if isinstance(event, Done) and event.row]) == 2
    assert not any(isinstance(event, Sampling) for event in events)
    assert result_in(place / "out") == wanted
    assert names(place) == ["out"]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_transposed_weights_biases_and_kept_layers_too(family, tmp_path, place, torn):
    """GPT-2 has its weights the other way round; a width of 72 is kept by the packed format."""
    wide = {"n_inner": 72} if family == "gpt2" else {"ffn_dim": 72}
    source = make_checkpoint(tmp_path / "model", family, initializer_range=0.1, **wide)
    options = {**RANDOM, "format": "gptq"}
    wanted = undisturbed(source, place, **options)
    assert any(layer["kept"] for layer in wanted["qinit.json"]["layers"])
    for _ in range(2):
        torn(3)
        with pytest.raises(Crash):
            finish(source, place / "out", **options)
    torn(0)
    finish(source, place / "out", **options)
    assert result_in(place / "out") == wanted


@pytest.mark.parametrize(
    ("family", "values", "note"),
    [
        ("gemma4", ENTANGLED, "with the whole model in memory"),
        ("bert", {}, "lies outside of the model's blocks"),
        ("t5", {}, ""),
    ],
)
def test_models_that_are_no_row_of_blocks_or_two_and_layers_outside_of_one_too(
    family, values, note, tmp_path, place, torn
):
    source = make_float32(tmp_path / family, family, **values)
    options = {**RANDOM, "calibration_length": 16, "format": "dense", "group_size": 32}
    wanted = undisturbed(source, place, **options)
    assert note in str(wanted["qinit.json"]["notes"])
    for number in (3, 6):
        torn(number)
        with pytest.raises(Crash):
            finish(source, place / "out", **options)
    torn(0)
    assert finish(source, place / "out", **options)[0].layers == 7
    assert result_in(place / "out") == wanted


def test_a_run_that_is_given_up_after_any_event_goes_on(strong_llama, place):
    options = {**RANDOM, "polish": 2}
    count = len(finish(strong_llama, place / "out", **options))
    wanted = result_in(place / "out")
    shutil.rmtree(place / "out")
    for number in random.Random(0).sample(range(1, count), 8):
        events = start(strong_llama, place / "out", **options)
        for _ in range(number):
            if isinstance(next(events, None), Finished):
                break
        events.close()
        if (place / "out").exists():
            break
    if not (place / "out").exists():
        finish(strong_llama, place / "out", **options)
    assert result_in(place / "out") == wanted


def test_finished_blocks_are_passed_through_and_nothing_is_solved_twice(strong_llama, place, monkeypatch):
    for event in (events := start(strong_llama, place / "out", **TEXT)):
        if isinstance(event, Done) and event.name == "model.layers.1.self_attn.q_proj.weight":
            break
    events.close()
    solved = []
    real = layer_module.solve
    monkeypatch.setattr(layer_module, "solve", lambda *arguments: solved.append(1) or real(*arguments))
    found = finish(strong_llama, place / "out", **TEXT)
    assert [event for event in found if isinstance(event, Passing)] == [Passing(0, 2), Passing(1, 2)]
    assert len(solved) == 6


def arguments(source, out, options):
    command = "meqft" if {"ratio", "target_bits"} & options.keys() else "eqft"
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return [command, source, "--out", out, "--rank", 4, *(part for part in given if part is not True)]


def test_a_real_run_that_is_killed_at_random_moments_ends_with_the_same_bytes(forks, strong_llama, tmp_path):
    """KILLS times SIGKILL in all, over a sequential run of mixed widths and a parallel one with a polish, at any moment
    but the first quarter, in which the options are read and the plan is made. A run that ends first took less time than
    was thought."""
    rng, log = random.Random(0), tmp_path / "log"
    kinds = ["mixed", "polish"]
    kills = dict.fromkeys(kinds, 0)
    resumed = 0
    for kind in kinds:
        place = tmp_path / kind
        place.mkdir()
        line = arguments(strong_llama, place / "out", RUNS[kind])
        code, seconds = forks.run(log, *line)
        assert code == 0, log.read_text()
        wanted = result_in(place / "out")
        shutil.rmtree(place / "out")
        while kills[kind] < KILLS // len(kinds) or not (place / "out").exists():
            left = KILLS // len(kinds) - kills[kind]
            code, took = forks.run(log, *line, kill_after=rng.uniform(0.25, 0.95) * seconds if left else None)
            goes_on = "resuming: " in log.read_text()
            resumed += goes_on
            if code == 0 and not goes_on:
                seconds = min(seconds, took)
            kills[kind] += code == -9
            assert code in (0, -9), log.read_text()
            if (place / "out").exists():  # killed or not: at its name it is whole
                assert result_in(place / "out") == wanted, kind
                if left:
                    shutil.rmtree(place / "out")
            else:
                assert code == -9
    assert sum(kills.values()) == KILLS
    assert resumed >= len(kinds)
