"""A finished run that is polished further."""

import errno
import json
import os
import random
import shutil
from functools import partial

import pytest
import safetensors.torch
import torch

from qinit.errors import OutputError, ReportError
from qinit.events import Done, Finished, Noted, Progress, Resumed, Unchanged
from qinit.files.manifest import refresh
from qinit.files.writer import SafetensorsWriter
from qinit.report.report import Report
from qinit.runner import again
from qinit.runner.again import polish_run
from qinit.train.polish import polish
from qinit.verification.verify import verify
from qinit.workplace.place import Workplace, partial_of
from tests.broken_off import Crash, result_in
from tests.helpers import contents, edit_json, edit_tensors, names, quantize, weights_of
from tests.models import make_checkpoint
from tests.qinit.runner.polishing import KINDS, SHORT, TEXT, give_up, polished
from tests.qinit.runner.test_calibrated import FEW, source_weights
from tests.stock import delta, dense_weight, load, lora_modules, relative

KILLS = 2
STEPS = 12  # the held-out text is looked at before, after ten and at the end


def findings(directory, source):
    return [str(event) for event in verify(directory, source) if type(event).__name__ == "Finding" and event.grave]


def parts(directory):
    """Return the tensors of a base that hold codes, and all others that a polish may change."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    return tensors


class TestWhatComesOfIt:
    @pytest.mark.parametrize("kind", KINDS)
    def test_codes_stay_factors_change_and_the_errors_are_those_of_what_is_loaded(self, kind, ready, strong_llama):
        run = ready(kind)
        before, old = parts(run), Report.read(run)
        last = polished(run)
        assert isinstance(last, Finished)
        after, report = parts(run), Report.read(run)
        assert report == last.report
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        scales = {name for name in before if name.endswith(".scales")}
        assert changed == scales
        assert bool(scales) == (report.recipe["format"] == "gptq")
        assert findings(run, strong_llama) == []
        fields = ("name", "bits", "group_size", "rank", "bytes_after", "trace", "tokens", "seconds")
        for one, other in zip(old.layers, report.layers, strict=True):
            assert [getattr(one, field) for field in fields] == [getattr(other, field) for field in fields]
            assert one.error != other.error
            assert (one.error_start != other.error_start) == bool(scales)
        if kind != "ranks":  # no stock loader takes it
            modules, weights = lora_modules(load(run)), source_weights(strong_llama)
            for row in report.layers:
                loaded = dense_weight(modules[row.name].base_layer) + delta(modules[row.name])
                assert relative(loaded, weights[row.name]) == pytest.approx(row.error, rel=2e-3)

    def test_own_text_is_written_once_more_and_read_beside_what_qinit_brings(self, strong_reader, tmp_path):
        own = {"calibration": "self", "calibration_samples": 4, "calibration_length": 32}
        first = quantize(strong_reader, tmp_path / "out", **own, polish=3).totals["calibration"]
        *_, last = polish_run(tmp_path / "out", steps=3, check=False)
        text = f"{first['text']}; and 128 windows of 32 tokens from the text that qinit brings, seed 0"
        for found in (first["polish"], last.report.totals["calibration"]["polish"]):
            assert (found["text"], found["tokens"]) == (text, 132 * 32)

    def test_who_asks_for_own_text_gets_it(self, strong_reader, place):
        own = {"calibration": "self", "calibration_samples": 4, "calibration_length": 32}
        quantize(strong_reader, place / "out", **own)
        found = polished(place / "out", calibration="self").report.totals["calibration"]["polish"]["text"]
        assert found.startswith("32 texts of 32 tokens that the model wrote itself, seed 0; and ")

    def test_the_report_says_what_was_done_and_when(self, ready):
        run = ready("polished before")
        old = Report.read(run)
        first = old.totals["calibration"]["polish"]
        report = polished(run).report
        found = report.totals["calibration"]["polish"]
        assert found["earlier"] == [first]
        assert (found["steps"], found["text"], found["tokens"]) == (5, "160 samples of 32 random tokens, seed 0", 5120)
        assert found["held_out_after"] < found["held_out_before"]
        third = polished(run, steps=4, calibration_length=16, seed=1).report.totals["calibration"]["polish"]
        assert [each["steps"] for each in (*third["earlier"], third)] == [2, 5, 4]
        assert all("earlier" not in each for each in third["earlier"])
        assert report.command == "qinit polish"
        assert report.recipe == {**old.recipe, "check": False}
        assert report.source == old.source
        assert report.totals["seconds"] > old.totals["seconds"]
        assert report.totals["peak_memory_bytes"] >= old.totals["peak_memory_bytes"]
        assert "output_error" not in report.totals
        card = (run / "README.md").read_text()
        assert "; then 5 steps on 160 samples of 32 random tokens, seed 0, held-out loss " in card

    def test_a_run_without_data_is_polished_on_text_that_qinit_brings(self, strong_reader, place):
        quantize(strong_reader, place / "out")
        last = polished(place / "out", calibration=None, calibration_samples=8, calibration_length=16)
        assert last.report.recipe["calibration"] == "none"
        found = last.report.totals["calibration"]
        assert set(found) == {"polish"}
        assert found["polish"]["text"].endswith(" windows of 16 tokens from the text that qinit brings, seed 0")
        assert f"| polish | 5 steps on {found['polish']['text']}, held-out" in (place / "out/README.md").read_text()

    def test_it_is_measured_anew_and_old_evaluations_are_left_out(self, ready, monkeypatch):
        run = ready()
        evaluation = {"text": "a", "length": 8, "stride": None, "perplexity": 3.0}
        old = {"kl": 9.0, "text": "random tokens, as there is no tokenizer", "tokens": 7}
        edit_json(run / "qinit.json", lambda raw: raw["totals"].update(evaluations=[evaluation], check=old))
        edit_json(run / "qinit.json", lambda raw: raw["notes"].append("check: this start is broken"))
        refresh(run, ["qinit.json"])
        (run / "README.md").unlink()  # it would have to fit
        report = polished(run, check=True).report
        check = report.totals["check"]
        assert check["tokens"] > 1000
        kl = {"before": 9.0, "after": check["kl"], "tokens": [7, check["tokens"]]}
        assert report.totals["calibration"]["polish"]["kl"] == kl
        assert "evaluations" not in report.totals
        assert again.OLD_EVALUATIONS in report.notes
        assert "check: this start is broken" not in report.notes
        assert report.recipe["check"]

    def test_what_the_run_brought_along_is_taken_over(self, ready):
        run = ready("mixed")
        (run / "tokenizer").mkdir()
        (run / "tokenizer/words.txt").write_text("a b")
        refresh(run, ["tokenizer/words.txt"])
        old, before = Report.read(run), contents(run)
        report = polished(run).report
        after = contents(run)
        assert after.keys() == before.keys()
        for name in ("sensitivity.json", "tokenizer/words.txt", "config.json"):
            assert after[name] == before[name]
        configs = [json.loads(files["eqft_init/adapter_config.json"]) for files in (before, after)]
        assert configs[0] == configs[1]
        assert report.totals["allocation"] == old.totals["allocation"]

    def test_kept_layers_are_as_they_were(self, tmp_path, place):
        source = make_checkpoint(tmp_path / "m", intermediate_size=80, initializer_range=0.1)
        quantize(source, place / "out", **FEW)
        before = weights_of(place / "out")
        report = polished(place / "out").report
        assert report.totals["layers_kept"] == 6
        assert weights_of(place / "out") != before
        assert findings(place / "out", source) == []

    def test_the_same_bytes_in_place_and_elsewhere(self, ready, place):
        run = ready()
        before = contents(run)
        last = polished(run, place / "other")
        assert (last.directory, contents(run)) == (place / "other", before)
        polished(run)
        one, other = result_in(run), result_in(place / "other")
        differing = {name for name in one if one[name] != other[name]}
        assert differing == {"eqft_init/adapter_config.json", "SHA256SUMS"}  # the base's place

    def test_nothing_gained_leaves_every_byte(self, ready, place, monkeypatch):
        monkeypatch.setattr("qinit.runner.polished.polish", partial(polish, learning_rate=0.0, stretch_rate=0.0))
        run = ready()
        before = contents(run)
        *events, last = polish_run(run, **SHORT)
        assert isinstance(last, Unchanged)
        assert last.directory == run
        assert Noted("polish: did not lower the held-out loss, so the adapters stay as they were") in events
        assert isinstance(polished(run, place / "other"), Unchanged)
        assert contents(run) == before
        assert names(place) == ["out"]


class TestBrokenOff:
    @pytest.mark.parametrize("kind", ["packed", "mixed"])
    def test_after_any_event_it_goes_on_and_ends_with_the_same_bytes(self, kind, ready, place):
        run = ready(kind)
        start = contents(run)
        shutil.copytree(run, place / "kept")
        count = len(list(polish_run(run, command="qinit polish", **SHORT)))
        wanted = result_in(run)
        shutil.rmtree(run)
        (place / "kept").rename(run)
        for number in (3, 20, 40, count - 5, count - 2):
            events = polish_run(run, command="qinit polish", **SHORT)
            for _ in range(number):
                if isinstance(next(events), Progress):
                    break
            events.close()
            assert contents(run) == start
        events = list(polish_run(run, command="qinit polish", **SHORT))
        assert isinstance(events[0], Resumed)
        assert not any(isinstance(event, Done) for event in events)
        assert result_in(run) == wanted
        assert names(place) == ["out"]

    def test_between_two_evaluations_and_while_its_result_is_written(self, ready, place, monkeypatch):
        monkeypatch.setattr("qinit.train.polish.EVALUATE_EVERY", 2)
        run = ready()
        shutil.copytree(run, place / "kept")
        polished(run)
        wanted = result_in(run)
        shutil.rmtree(run)
        (place / "kept").rename(run)
        events = polish_run(run, command="qinit polish", **SHORT)
        for event in events:
            if isinstance(event, Progress) and event.step == 3:
                events.close()
        with monkeypatch.context() as context:
            context.setattr(SafetensorsWriter, "write", _failing_at("layers.1.mlp.up", Crash()))
            with pytest.raises(Crash):
                polished(run)
        with monkeypatch.context() as context:
            context.setattr("qinit.runner.run.complete", _raise(Crash()))
            with pytest.raises(Crash):
                polished(run)
        with monkeypatch.context() as context:
            context.setattr("qinit.runner.polished.polish", _raise(Crash()))  # it was made
            polished(run)
        assert result_in(run) == wanted

    def test_behind_its_last_step_it_is_not_made_twice(self, ready, place, monkeypatch):
        run = ready()
        real = Workplace.finish

        def finish(self):
            real(self)
            raise Crash

        with monkeypatch.context() as context:
            context.setattr(Workplace, "finish", finish)
            with pytest.raises(Crash):
                polished(run)
        assert names(place) == [".out.partial", "out"]
        wanted = result_in(run)
        assert isinstance(polished(run), Finished)
        assert result_in(run) == wanted
        assert names(place) == ["out"]
        polished(run)  # asked for once more
        assert len(Report.read(run).totals["calibration"]["polish"]["earlier"]) == 1

    def test_between_the_two_renames_the_run_is_put_back(self, ready, place):
        run = ready()
        give_up(run)
        run.rename(place / ".out.replaced")
        assert isinstance(polished(run), Finished)
        assert names(place) == ["out"]

    def test_a_full_disk_leaves_the_run_as_it_was_and_the_same_command_goes_on(self, ready, place, monkeypatch):
        run = ready()
        before = contents(run)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with monkeypatch.context() as context:
            context.setattr(SafetensorsWriter, "write", _failing_at("layers.1.mlp.up", full))
            with pytest.raises(OutputError, match=r"No space left on device.* layers are kept, the same command goes"):
                polished(run)
        assert contents(run) == before
        assert isinstance(polished(run), Finished)
        assert names(place) == ["out"]

    def test_another_command_is_refused_unless_it_may_overwrite(self, ready, place, strong_llama):
        run = ready()
        give_up(run)
        with pytest.raises(OutputError, match=r"an unfinished run for something else .*polish was 5, now 6; .*--over"):
            polished(run, steps=6)
        assert isinstance(polished(run, steps=6, overwrite=True), Finished)
        give_up(run, place / "other")
        with pytest.raises(OutputError, match=r"the run that is polished was sha256:\w+, now not given"):
            quantize(strong_llama, place / "other", **TEXT)

    def test_a_run_that_was_changed_is_not_gone_on_with(self, ready):
        run = ready()
        give_up(run)
        edit_json(run / "qinit.json", lambda raw: raw.update(notes=["another"]))
        refresh(run, ["qinit.json"])
        (run / "README.md").unlink()
        with pytest.raises(OutputError, match="the run that is polished changed"):
            polished(run)

    def test_a_run_that_is_changed_meanwhile_is_left_alone(self, ready, place):
        run = ready()
        events = polish_run(run, **SHORT)
        for event in events:
            if isinstance(event, Progress):
                break
        (run / "mine.txt").write_text("x")
        with pytest.raises(OutputError, match=r"holds what the run did not write.*: mine\.txt; move it elsewhere"):
            list(events)
        (run / "mine.txt").unlink()
        edit_tensors(run / "eqft_init/adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1))
        trained = weights_of(run)
        with pytest.raises(ReportError, match="the adapter was trained"):
            polished(run)
        assert weights_of(run) == trained
        assert partial_of(run).exists()


def _raise(error):
    def fail(*_, **__):
        raise error

    return fail


def _failing_at(part, error):
    """Return a `write` that fails at a factor of a layer once the polish is made."""
    real = SafetensorsWriter.write

    def write(self, name, tensor):
        made = (self._directory.parent.parent / "polished.safetensors").exists()
        if made and self._stem == "adapter_model" and part in name:
            raise error
        return real(self, name, tensor)

    return write


def test_a_real_polish_that_is_killed_at_random_moments_ends_with_the_same_bytes(forks, ready, place, tmp_path):
    rng, log, kills = random.Random(0), tmp_path / "log", 0
    run = ready()
    before = contents(run)
    shutil.copytree(run, tmp_path / "kept")
    text = [part for key, value in TEXT.items() for part in (f"--{key.replace('_', '-')}", value)]
    line = ("polish", run, "--steps", STEPS, "--no-check", *text)
    code, seconds = forks.run(log, *line)
    assert code == 0, log.read_text()
    wanted = result_in(run)
    while kills < KILLS:
        _put(tmp_path / "kept", run)
        # A signal may come after the last step: the same command would then polish what was polished.
        while names(place) != ["out"] or contents(run) == before:
            after = rng.uniform(0.1, 0.95) * seconds if kills < KILLS else None
            code, took = forks.run(log, *line, kill_after=after)
            kills += code == -9
            if code == 0 and "resuming: " not in log.read_text():
                seconds = min(seconds, took)
            assert code in (0, -9), log.read_text()
        assert result_in(run) == wanted


def _put(kept, run):
    shutil.rmtree(run)
    shutil.copytree(kept, run)
