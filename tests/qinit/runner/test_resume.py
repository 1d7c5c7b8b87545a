"""A run that is broken off goes on where it was, and ends with the same bytes as one that never was."""

import errno
import json
import os
import random
import shutil
import subprocess

import pytest
import torch

from qinit.errors import OutputError
from qinit.events import Discarded, Done, Finished, Noted, Passing, Resumed, Sampling
from qinit.files.tensors import read_header
from qinit.files.writer import SafetensorsWriter
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner import layer as layer_module
from qinit.runner.run import run
from qinit.workplace.journal import Journal, finished_layers, read_journal
from qinit.workplace.place import kept, partial_of
from tests.helpers import names
from tests.models import make_checkpoint, make_float32
from tests.qinit.runner.forking import Forks

KILLS = 20
TEXT = {"calibration": "self", "calibration_samples": 8, "calibration_length": 32}
RANDOM = {**TEXT, "calibration": "random"}
# What a run may be asked for; each has other things to keep.
RUNS = {
    "data-free": {"calibration": "none", "iter": 1, "max_shard_size": "40KB"},
    "sequential": {**TEXT, "use_rslora": True, "lora_alpha": 7.0},
    "parallel": {**TEXT, "calibration_mode": "parallel", "format": "dense"},
    "mixed": {**TEXT, "ratio": 0.5},
    "mixed without calibration": {"calibration": "none", "iter": 1, "target_bits": 3.0, "format": "gptq"},
    "polish": {**RANDOM, "calibration_samples": 128, "calibration_mode": "parallel", "polish": 5},
    "whole model": {**RANDOM, "method": "lq-lora", "format": "dense"},
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def start(source, out, *, overwrite=False, **options):
    recipe = make_recipe(**{"model": str(source), "rank": 4, **options})
    return run(make_plan(recipe, source, str(source)), out, overwrite=overwrite, command="qinit")


def finish(source, out, **options):
    """Carry a run out to its end; returns its events."""
    events = list(start(source, out, **options))
    assert isinstance(events[-1], Finished)
    return events


def contents(directory):
    """Return all files of a finished run; its report without the times and the memory, its list without that sum."""
    files = {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    report = json.loads(files.pop("qinit.json"))
    assert report["totals"].pop("seconds") > 0
    assert report["totals"].pop("peak_memory_bytes") > 0
    assert all(layer.pop("seconds") >= 0 for layer in report["layers"])
    lines = files.pop("SHA256SUMS").splitlines()
    return {**files, "qinit.json": report, "SHA256SUMS": [line for line in lines[:-1] if b"qinit.json" not in line]}


def undisturbed(source, place, **options):
    """Return the contents of a run that nothing happens to, at the place that the other will have."""
    finish(source, place / "out", **options)
    found = contents(place / "out")
    shutil.rmtree(place / "out")
    return found


class Crash(BaseException):
    """What no code is prepared for."""


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
    assert contents(place / "out") == wanted
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
    assert contents(place / "out") == wanted


@pytest.mark.parametrize(
    ("family", "note"), [("t5", "with the whole model in memory"), ("bert", "lies outside of the model's blocks")]
)
def test_models_that_are_no_row_of_blocks_and_layers_outside_of_one_too(family, note, tmp_path, place, torn):
    source = make_float32(tmp_path / family, family)
    options = {**RANDOM, "calibration_length": 16, "format": "dense", "group_size": 32}
    wanted = undisturbed(source, place, **options)
    assert note in str(wanted["qinit.json"]["notes"])
    for number in (3, 6):
        torn(number)
        with pytest.raises(Crash):
            finish(source, place / "out", **options)
    torn(0)
    assert finish(source, place / "out", **options)[0].layers == 7
    assert contents(place / "out") == wanted


def test_a_run_that_is_given_up_after_any_event_goes_on(strong_llama, place):
    options = {**RANDOM, "polish": 2}
    count = len(finish(strong_llama, place / "out", **options))
    wanted = contents(place / "out")
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
    assert contents(place / "out") == wanted


def test_finished_blocks_are_passed_through_and_nothing_is_solved_twice(strong_llama, place, monkeypatch):
    for event in (events := start(strong_llama, place / "out", **TEXT)):
        if isinstance(event, Done) and event.name == "model.layers.1.self_attn.q_proj.weight":
            break
    events.close()
    solved = []
    real = layer_module.solve
    monkeypatch.setattr(layer_module, "solve", lambda *arguments: solved.append(1) or real(*arguments))
    found = finish(strong_llama, place / "out", **TEXT)
    assert [event for event in found if isinstance(event, Passing)] == [Passing(0, 2)]
    assert len(solved) == 6


class TestWhatIsKept:
    def broken_off(self, source, out, layers, **options):
        """Break a run off after so many layers."""
        events = start(source, out, **options)
        for event in events:
            if isinstance(event, Done) and event.row is not None:
                layers -= 1
            if not layers:
                events.close()
        assert kept(out)

    def test_a_polish_that_was_made_is_not_made_again(self, strong_llama, place, monkeypatch):
        options = RUNS["polish"]
        wanted = undisturbed(strong_llama, place, **options)
        assert wanted["qinit.json"]["totals"]["calibration"]["polish"]["kept"]

        def crash(*_):
            raise Crash

        with monkeypatch.context() as context:
            context.setattr("qinit.runner.run.complete", crash)
            with pytest.raises(Crash):
                finish(strong_llama, place / "out", **options)
        monkeypatch.setattr("qinit.runner.polished.polish", crash)
        finish(strong_llama, place / "out", **options)
        assert contents(place / "out") == wanted

    def test_a_crash_while_polished_factors_are_written_spoils_nothing(self, strong_llama, place, monkeypatch):
        options = RUNS["polish"]
        wanted = undisturbed(strong_llama, place, **options)
        real = SafetensorsWriter.write

        def write(self, name, tensor):
            polished = (partial_of(place / "out") / "polished.safetensors").exists()
            if polished and self._stem == "adapter_model" and "layers.1.mlp.up" in name:
                raise Crash
            return real(self, name, tensor)

        with monkeypatch.context() as context:
            context.setattr(SafetensorsWriter, "write", write)
            with pytest.raises(Crash):
                finish(strong_llama, place / "out", **options)
        finish(strong_llama, place / "out", **options)
        assert contents(place / "out") == wanted

    def test_sensitivities_are_not_measured_again(self, strong_llama, place, monkeypatch):
        options = RUNS["mixed"]
        wanted = undisturbed(strong_llama, place, **options)

        def crash(*_, **__):
            raise Crash

        with monkeypatch.context() as context:
            context.setattr("qinit.runner.job.Store", crash)
            with pytest.raises(Crash):
                finish(strong_llama, place / "out", **options)
        assert kept(place / "out").startswith("the measured sensitivities are kept")
        monkeypatch.setattr("qinit.widths.fisher.measure", crash)
        finish(strong_llama, place / "out", **options)
        assert contents(place / "out") == wanted

    def test_what_the_model_wrote_is_worth_keeping_and_random_tokens_are_not(self, strong_llama, place, monkeypatch):
        def crash(*_, **__):
            raise Crash

        monkeypatch.setattr(layer_module, "solve", crash)
        for options, words in ((TEXT, "the text that the model wrote is kept"), (RANDOM, "")):
            with pytest.raises(Crash):
                finish(strong_llama, place / options["calibration"], **options)
            assert kept(place / options["calibration"]).startswith(words)
        assert names(place) == [".self.partial"]

    def test_bytes_that_are_not_those_of_the_journal_are_made_again(self, strong_llama, place):
        options = RUNS["sequential"]
        wanted = undisturbed(strong_llama, place, **options)
        self.broken_off(strong_llama, place / "out", 9, **options)
        file = partial_of(place / "out") / "run/model.safetensors"
        place_of = read_header(file)["model.layers.0.mlp.up_proj.scales"].offset
        raw = bytearray(file.read_bytes())
        raw[place_of] ^= 1
        file.write_bytes(raw)
        done = [
            event for event in finish(strong_llama, place / "out", **options) if isinstance(event, Done) and event.row
        ]
        assert len(done) == 6  # five were left, one was damaged
        assert contents(place / "out") == wanted

    @pytest.mark.parametrize("gone", ["run/model.safetensors", "run/eqft_init/adapter_model.safetensors", "run", "."])
    def test_files_that_are_gone_are_made_again(self, strong_llama, place, gone):
        wanted = undisturbed(strong_llama, place, **RANDOM)
        self.broken_off(strong_llama, place / "out", 9, **RANDOM)
        path = partial_of(place / "out") / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        finish(strong_llama, place / "out", **RANDOM)
        assert contents(place / "out") == wanted

    def test_a_damaged_text_is_an_error(self, strong_llama, place):
        self.broken_off(strong_llama, place / "out", 9, **TEXT)
        file = partial_of(place / "out") / "samples.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        with pytest.raises(OutputError, match=r"samples\.safetensors: damaged, .* remove .*partial to start anew"):
            finish(strong_llama, place / "out", **TEXT)

    def test_a_damaged_journal_is_said_and_the_run_starts_anew(self, strong_llama, place):
        wanted = undisturbed(strong_llama, place, **RANDOM)
        self.broken_off(strong_llama, place / "out", 9, **RANDOM)
        journal = partial_of(place / "out") / "journal"
        journal.write_bytes(b"{" + journal.read_bytes())
        events = finish(strong_llama, place / "out", **RANDOM)
        assert events[0] == Discarded("the journal of an unfinished run is damaged")
        assert contents(place / "out") == wanted

    def test_times_add_up(self, strong_llama, place, monkeypatch):
        self.broken_off(strong_llama, place / "out", 3, **RANDOM)
        file = partial_of(place / "out") / "journal"
        journal = Journal.open(file)
        monkeypatch.setattr(Journal, "seconds", 1000.0)
        journal.append({"kind": "note", "text": "a long time"})
        journal.close()
        monkeypatch.undo()
        report = finish(strong_llama, place / "out", **RANDOM)[-1].report
        assert 1000 < report.totals["seconds"] < 1100
        assert "a long time" in report.notes

    def test_nothing_of_the_broken_off_run_is_left_in_the_result(self, strong_llama, place):
        self.broken_off(strong_llama, place / "out", 9, **TEXT)
        partial = partial_of(place / "out")
        (partial / "scratch").mkdir()
        (partial / "scratch/states").write_bytes(b"x")
        finish(strong_llama, place / "out", **TEXT)
        assert names(place) == ["out"]
        assert not [path for path in (place / "out").rglob("*") if path.name.startswith(".")]


class TestAnotherRun:
    @pytest.fixture
    def unfinished(self, strong_llama, place):
        events = start(strong_llama, place / "out", **RANDOM)
        for event in events:
            if isinstance(event, Done) and event.name.endswith("o_proj.weight"):
                break
        events.close()
        return place / "out"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"bits": 3}, "bits was 2, now 3"),
            ({"rank": 8}, "rank was 4, now 8"),
            ({"seed": 7}, "seed was 0, now 7"),
            ({"exclude": "up_proj"}, "exclude was not given, now up_proj"),
            ({"calibration_samples": 9}, "calibration_samples was 8, now 9"),
            ({"calibration": "self"}, "calibration was random, now self"),
            ({"ratio": 0.5}, "ratio was not given, now 0.5"),
        ],
    )
    def test_it_is_refused_and_the_difference_is_shown(self, strong_llama, unfinished, change, words):
        with pytest.raises(OutputError) as caught:
            finish(strong_llama, unfinished, **{**RANDOM, **change})
        assert f"(4 of 14 layers are kept): {words}" in str(caught.value).replace("format was gptq, now dense; ", "")
        assert "to start anew pass --overwrite" in str(caught.value)
        assert kept(unfinished).startswith("4 of 14 layers")

    def test_another_source_another_version_and_another_number_of_threads_are_seen(
        self, strong_llama, unfinished, monkeypatch
    ):
        file = strong_llama / "model.safetensors"
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        os.utime(file, ns=(times[0], times[1] + 1))
        monkeypatch.setattr("qinit.workplace.signature.versions", lambda: {"torch": "9.9", "python": "4.0"})
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        with pytest.raises(OutputError) as caught:
            finish(strong_llama, unfinished, **RANDOM)
        os.utime(file, ns=times)
        for words in (
            "the model's model.safetensors was ",
            f"version of torch was {torch.__version__.partition('+')[0]}",
            "now 9.9",
            "threads (OMP_NUM_THREADS) was ",
            "now 77",
        ):
            assert words in str(caught.value)
        assert "python" not in str(caught.value)

    def test_overwrite_discards_it_and_says_so(self, strong_llama, unfinished):
        events = finish(strong_llama, unfinished, overwrite=True, **{**RANDOM, "bits": 3})
        assert isinstance(events[0], Discarded)
        assert "was for something else (bits was 2, now 3)" in events[0].reason
        assert events[-1].report.recipe["bits"] == 3
        assert events[-1].report.notes == finish(strong_llama, unfinished.parent / "b", **RANDOM)[-1].report.notes

    def test_overwrite_goes_on_with_the_same(self, strong_llama, unfinished):
        assert isinstance(finish(strong_llama, unfinished, overwrite=True, **RANDOM)[0], Resumed)

    def test_one_without_a_finished_layer_is_no_obstacle(self, strong_llama, place):
        events = start(strong_llama, place / "out", **RANDOM)
        while not isinstance(next(events), Sampling):
            pass
        shutil.copytree(partial_of(place / "out"), place / "copy")
        events.close()
        (place / "copy").rename(partial_of(place / "out"))
        (partial_of(place / "out") / "lock").unlink()
        assert not isinstance(finish(strong_llama, place / "out", **{**RANDOM, "bits": 3})[0], Resumed | Discarded)

    def test_the_calibration_text_is_part_of_it(self, strong_llama, place, monkeypatch):
        from qinit.workplace.signature import signature

        file = place / "text.txt"
        file.write_text("one")
        monkeypatch.setattr("qinit.planner.make.check_source", lambda *_, **__: None)
        plan = make_plan(make_recipe(calibration=str(file)), strong_llama, "name")
        one = signature(plan, torch.device("cpu"))
        file.write_text("two")
        assert one != signature(plan, torch.device("cpu"))

    def test_auto_stays_what_it_was(self, strong_llama, place, monkeypatch):
        """It depends on the memory that is free just then."""
        choose = "qinit.planner.make.choose"
        monkeypatch.setattr(choose, lambda plan, device: ("self", "on its own text"))
        options = {**TEXT, "calibration": "auto"}
        wanted = undisturbed(strong_llama, place, **options)
        events = start(strong_llama, place / "out", **options)
        while not isinstance(next(events), Done):
            pass
        events.close()
        monkeypatch.setattr(choose, lambda plan, device: ("none", "no memory, 3 s"))
        finish(strong_llama, place / "out", **options)
        assert contents(place / "out") == wanted

    def test_another_processor_is_noted(self, strong_llama, unfinished, monkeypatch):
        monkeypatch.setattr("qinit.workplace.resume.processor", lambda: "Another 3000")
        events = finish(strong_llama, unfinished, **RANDOM)
        assert isinstance(events[1], Noted)
        assert "now Another 3000), so that last bits may differ" in events[1].text
        assert events[1].text in events[-1].report.notes


class TestFullDisk:
    @pytest.mark.parametrize("number", [3, 30])
    def test_it_is_one_error_and_the_run_goes_on_when_there_is_space(self, strong_llama, place, monkeypatch, number):
        wanted = undisturbed(strong_llama, place, **RANDOM)
        real, calls = SafetensorsWriter.write_chunks, iter(range(1000))

        def write(self, *arguments):
            if next(calls) >= number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, *arguments)

        with monkeypatch.context() as context:
            context.setattr(SafetensorsWriter, "write_chunks", write)
            with pytest.raises(OutputError) as caught:
                finish(strong_llama, place / "out", **RANDOM)
        layers = (number - 1) // 6  # the text, then six tensors for each
        left = f"{layers} of 14 layers are kept, the same command goes on from there" if layers else "nothing was left"
        assert f"cannot be written (No space left on device); {left}" in str(caught.value)
        assert "GB free and the run needs 0.00 GB more: make space and start again" in str(caught.value)
        finish(strong_llama, place / "out", **RANDOM)
        assert contents(place / "out") == wanted

    def test_a_journal_that_cannot_be_written_on_is_the_same(self, strong_llama, place, monkeypatch):
        wanted = undisturbed(strong_llama, place, **RANDOM)
        real, calls = os.write, iter(range(1000))

        def write(descriptor, data):
            if next(calls) == 7:
                real(descriptor, bytes(data)[:50])
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data)

        with monkeypatch.context() as context:
            context.setattr("qinit.workplace.journal.os.write", write)
            with pytest.raises(OutputError, match="6 of 14 layers are kept"):
                finish(strong_llama, place / "out", **RANDOM)
        finish(strong_llama, place / "out", **RANDOM)
        assert contents(place / "out") == wanted

    @pytest.mark.parametrize("kind", ["sequential", "data-free"])
    def test_a_real_one(self, strong_llama, place, kind):
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", place], capture_output=True, text=True, check=False
        )
        if mount.returncode:
            pytest.skip(f"a small disk cannot be mounted here, which needs root ({mount.stderr.strip()})")
        try:
            wanted = undisturbed(strong_llama, place, **RUNS[kind])
            with pytest.raises(OutputError) as caught:
                self.filled_up(place / "filler", start(strong_llama, place / "out", **RUNS[kind]))
            assert "No space left on device" in str(caught.value)
            assert " of 14 layers are kept, the same command goes on from there" in str(caught.value)
            assert f"the disk at {place} has 0.00 GB free" in str(caught.value)
            assert names(place) == [".out.partial", "filler"]
            (place / "filler").unlink()
            assert isinstance(finish(strong_llama, place / "out", **RUNS[kind])[0], Resumed)
            assert contents(place / "out") == wanted
        finally:
            subprocess.run(["umount", place], check=True)

    def filled_up(self, file, events):
        for event in events:
            if isinstance(event, Done) and event.name == "model.layers.1.mlp.down_proj.weight":
                with file.open("wb", buffering=0) as handle:
                    free = os.statvfs(file.parent).f_bavail
                    assert handle.write(bytes(4096 * free)) == 4096 * free


def arguments(source, out, options):
    command = "meqft" if {"ratio", "target_bits"} & options.keys() else "eqft"
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return [command, source, "--out", out, "--rank", 4, *(part for part in given if part is not True)]


def test_a_real_run_that_is_killed_at_random_moments_ends_with_the_same_bytes(strong_llama, tmp_path):
    """KILLS times SIGKILL in all, over runs of five kinds, at any moment of the run but its first quarter, in which the
    options are read and the plan is made."""
    rng, log = random.Random(0), tmp_path / "log"
    kinds = ["data-free", "sequential", "parallel", "mixed", "polish"]
    kills = dict.fromkeys(kinds, 0)
    resumed = 0
    with Forks(*arguments(strong_llama, tmp_path / "warm", RUNS["polish"])) as forks:
        for kind in kinds:
            place = tmp_path / kind
            place.mkdir()
            line = arguments(strong_llama, place / "out", RUNS[kind])
            code, seconds = forks.run(log, *line)
            assert code == 0, log.read_text()
            wanted = contents(place / "out")
            shutil.rmtree(place / "out")
            while kills[kind] < KILLS // len(kinds) or not (place / "out").exists():
                left = KILLS // len(kinds) - kills[kind]
                code, _ = forks.run(log, *line, kill_after=rng.uniform(0.25, 0.95) * seconds if left else None)
                resumed += "resuming: " in log.read_text()
                kills[kind] += code == -9
                assert code in (0, -9), log.read_text()
                if (place / "out").exists():  # killed or not: at its name it is whole
                    assert contents(place / "out") == wanted, kind
                    if left:
                        shutil.rmtree(place / "out")
                else:
                    assert code == -9
    assert sum(kills.values()) == KILLS
    assert resumed >= len(kinds)
