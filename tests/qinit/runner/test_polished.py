"""A run's polish: what comes of it is what is written, and breaking it off anywhere changes no byte."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from qinit.adapters.reading import SavedAdapter
from qinit.events import Done, Noted, Passing, Progress, Reading, Sampling
from qinit.files.writer import SafetensorsWriter
from qinit.runner import polished
from qinit.runner import run as runner
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import read_architecture
from qinit.stream.weights import ModelWeights
from qinit.train.course import Course
from qinit.train.polish import polish
from qinit.workplace.journal import read_journal
from qinit.workplace.place import partial_of
from tests.broken_off import RUNS, Crash, finish, result_in, start, undisturbed
from tests.helpers import names, quantize, weights_of
from tests.mixed import gptq_only
from tests.models import make_checkpoint
from tests.qinit.runner.test_calibrated import FEW, POLISHED, events_of, source_weights
from tests.stock import delta, dense_weight, load, lora_modules, relative


@dataclass
class Case:
    """A run at a place, and what it comes to where nothing happens to it."""

    source: Path
    place: Path
    options: dict[str, Any]
    wanted: dict[str, Any]

    def begin(self, until: Callable[[Any], bool]) -> None:
        """Break the run off at the first event that is so."""
        for event in (events := start(self.source, self.place / "out", **self.options)):
            if until(event):
                events.close()
                return
        pytest.fail("it was never so")

    def crash(self, monkeypatch, owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        """Let a function crash for the first arguments that are so."""
        real = getattr(owner, name)

        def crashing(*arguments: Any, **options: Any) -> Any:
            if when(*arguments):
                raise Crash
            return real(*arguments, **options)

        with monkeypatch.context() as context:
            context.setattr(owner, name, crashing)
            with pytest.raises(Crash):
                finish(self.source, self.place / "out", **self.options)
        assert not (self.place / "out").exists()

    def end(self) -> list[Any]:
        """Go on, and come to the same bytes; returns the events."""
        events = finish(self.source, self.place / "out", **self.options)
        assert result_in(self.place / "out") == self.wanted
        assert names(self.place) == ["out"]
        return events


def steps(events):
    return [event.step for event in events if isinstance(event, Progress)]


@pytest.fixture(scope="class", params=["gptq", "dense"])
def undisturbed_case(request, strong_llama, tmp_path_factory):
    """A polish of five steps, every second of which is judged."""
    place, options = tmp_path_factory.mktemp("place"), {**RUNS["polish"], "format": request.param}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qinit.train.polish.EVALUATE_EVERY", 2)
        wanted = undisturbed(strong_llama, place, **options)
        assert wanted["qinit.json"]["totals"]["calibration"]["polish"]["kept"]
        yield Case(strong_llama, place, options, wanted)


@pytest.fixture
def case(undisturbed_case):
    yield undisturbed_case
    for left in undisturbed_case.place.iterdir():
        shutil.rmtree(left)


class TestBrokenOff:
    @pytest.mark.parametrize(("at", "again"), [([1], 0), ([3], 2), ([2, 3, 4], 4), ([5], 5)])
    def test_after_any_step_it_goes_on_with_the_same_bytes(self, case, at, again):
        for step in at:
            case.begin(lambda event, step=step: isinstance(event, Progress) and event.step == step)
        events = case.end()
        assert steps(events) == list(range(again, 6))
        assert not any(isinstance(event, Reading | Sampling | Passing) for event in events)  # the text is read once

    def test_the_time_until_then_counts(self, case):
        case.begin(lambda event: isinstance(event, Progress) and event.step == 3)
        records = read_journal(partial_of(case.place / "out") / "journal")
        assert [record["step"] for record in records if record["kind"] == "polishing"] == [0, 2]
        assert records[-1]["kind"] == "polishing"  # a journal's time goes on from its last record
        case.end()

    def test_while_the_source_reads_the_text_too(self, case):
        case.begin(lambda event: isinstance(event, Reading) and event.done == 1)
        assert [event.done for event in case.end() if isinstance(event, Reading)] == [1, 2]  # once more

    @pytest.mark.parametrize("row", [0, 70])
    def test_while_what_it_says_is_written_too(self, case, row, monkeypatch):
        case.crash(monkeypatch, SafetensorsWriter, "write", lambda _, name, __: name == f"{row}.ids")
        assert (partial_of(case.place / "out") / "lessons").is_dir()
        case.end()

    @pytest.mark.parametrize("step", [2, 5])
    def test_before_an_evaluation_is_written_down_too(self, case, step, monkeypatch):
        case.crash(monkeypatch, Course, "judge", lambda course, _: course.step == step)
        assert steps(case.end()) == list(range((step - 1) // 2 * 2, 6))

    def test_before_what_it_has_come_to_is_written_down_too(self, case, monkeypatch):
        case.crash(monkeypatch, polished, "save_polish")
        assert steps(case.end()) == [5]

    @pytest.mark.parametrize("part", ["lora_B", "scales"])
    def test_while_polished_tensors_are_written_it_spoils_nothing(self, case, part, monkeypatch):
        if (case.options["format"], part) == ("dense", "scales"):
            pytest.skip("a dense base has no scales")

        def under_way(writer, name, _):
            kept = (partial_of(case.place / "out") / "polished.safetensors").exists()
            return kept and writer._stem != "polished" and "layers.1.mlp.up" in name and part in name

        case.crash(monkeypatch, SafetensorsWriter, "write", under_way)
        assert not any(isinstance(event, Progress | Reading | Done) for event in case.end())

    def test_one_that_was_made_is_not_made_again(self, case, monkeypatch):
        case.crash(monkeypatch, runner, "complete")
        for name in ("polish", "teach", "student_of"):
            monkeypatch.setattr(polished, name, None)
        assert not any(isinstance(event, Done) for event in case.end())

    def test_where_its_state_is_damaged_it_starts_anew(self, case):
        case.begin(lambda event: isinstance(event, Progress) and event.step == 3)
        file = partial_of(case.place / "out") / "polishing.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
        assert steps(case.end()) == list(range(6))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda file: shutil.rmtree(file.parent),
            lambda file: file.unlink(),
            lambda file: file.write_bytes(file.read_bytes()[:-9]),
            lambda file: file.write_bytes(b"x" * 99),
        ],
    )
    def test_where_what_the_source_said_is_gone_it_is_asked_again(self, case, damage):
        case.begin(lambda event: isinstance(event, Progress) and event.step == 3)
        damage(partial_of(case.place / "out") / "lessons/teacher.safetensors")
        events = case.end()
        assert [event.done for event in events if isinstance(event, Reading)] == [1, 2]
        assert steps(events) == [2, 3, 4, 5]


class TestLoading:
    @pytest.mark.parametrize("format", ["gptq", "dense"])
    def test_a_polished_adapter_is_the_one_that_is_loaded(self, strong_llama, tmp_path, format):
        report = quantize(strong_llama, tmp_path / "out", format=format, use_rslora=True, lora_alpha=7.0, **POLISHED)
        assert report.totals["calibration"]["polish"]["kept"]
        modules, weights = lora_modules(load(tmp_path / "out")), source_weights(strong_llama)
        for row in report.layers:
            base = dense_weight(modules[row.name].base_layer)
            assert relative(base, weights[row.name]) == pytest.approx(row.error_start, rel=2e-3)
            assert relative(base + delta(modules[row.name]), weights[row.name]) == pytest.approx(row.error, rel=2e-3)

    def test_layers_of_several_widths_have_the_errors_of_the_report(self, strong_llama, tmp_path):
        report = quantize(strong_llama, tmp_path / "out", format="gptq", ratio=0.5, **POLISHED)
        assert report.totals["calibration"]["polish"]["kept"]
        assert len({row.bits for row in report.layers}) > 1
        checkpoint = Checkpoint.open(tmp_path / "out", quantized=True)
        adapter = SavedAdapter.open(tmp_path / "out/eqft_init")
        base, both = (ModelWeights(checkpoint, read_architecture(checkpoint), adapter=a) for a in (None, adapter))
        weights = source_weights(strong_llama)
        for row in report.layers:
            for found, told in ((base, row.error_start), (both, row.error)):
                weight = found.read(f"{row.name}.weight", torch.device("cpu"))
                assert relative(weight, weights[row.name]) == pytest.approx(told, rel=2e-3)

    def test_what_is_loaded_computes_as_the_student_did(self, strong_llama, tmp_path, monkeypatch):
        """The student that the factors and scales were taken from computes what a stock loader does, but for float16
        scales and gptqmodel's own rounding."""
        gptq_only()
        inputs = torch.arange(3, 43).view(2, 20)
        seen = []

        def watched(student, *arguments, **options):
            result = yield from polish(student, *arguments, **options)
            with torch.no_grad():
                seen.append(student(input_ids=inputs).logits)
            return result

        monkeypatch.setattr("qinit.runner.polished.polish", watched)
        quantize(strong_llama, tmp_path / "out", format="gptq", **POLISHED)
        with torch.no_grad():
            found = load(tmp_path / "out")(input_ids=inputs).logits
            before = load_unpolished(strong_llama, tmp_path)(input_ids=inputs).logits
        assert relative(found, seen[0]) < 5e-3
        assert relative(before, seen[0]) > 4 * relative(found, seen[0])

    @pytest.mark.parametrize("format", ["gptq", "dense"])
    def test_scales_change_and_codes_and_zero_points_do_not(self, strong_llama, tmp_path, format):
        for name, steps in (("plain", 0), ("out", 5)):
            quantize(strong_llama, tmp_path / name, format=format, **{**POLISHED, "polish": steps})
        one, other = (safetensors.torch.load_file(tmp_path / n / "model.safetensors") for n in ("plain", "out"))
        assert one.keys() == other.keys()
        changed = {name for name in one if not torch.equal(one[name], other[name])}
        assert changed == {name for name in one if name.endswith(".scales")}
        assert len(changed) == (14 if format == "gptq" else 0)
        for name in changed:
            assert bool(other[name].isfinite().all())
            assert bool((other[name] > 0).all())
            torch.testing.assert_close(other[name], one[name], rtol=0.1, atol=0)


def load_unpolished(source, tmp_path):
    quantize(source, tmp_path / "unpolished", format="gptq", **{**POLISHED, "polish": 0})
    return load(tmp_path / "unpolished")


def test_a_polished_run_too(strong_llama, tmp_path):
    for name in ("one", "two"):
        quantize(strong_llama, tmp_path / name, **POLISHED)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")


class TestPolish:
    def test_it_is_kept_where_it_lowers_the_held_out_loss(self, strong_llama, tmp_path):
        plain = quantize(strong_llama, tmp_path / "plain", **{**POLISHED, "polish": 0})
        *events, last = events_of(strong_llama, tmp_path / "out", **POLISHED)
        steps = [event for event in events if isinstance(event, Progress)]
        found = last.report.totals["calibration"]["polish"]
        assert [event.step for event in steps] == [0, 1, 2, 3, 4, 5]
        assert [event for event in events if isinstance(event, Reading)] == [Reading(1, 2), Reading(2, 2)]
        assert found == {
            **{"steps": 5, "held_out_before": steps[0].held_out, "held_out_after": steps[-1].held_out, "kept": True},
            **{"text": found["text"], "tokens": found["tokens"]},
        }
        assert found["held_out_after"] < found["held_out_before"]
        one, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "out")
        assert one["model.safetensors"] != other["model.safetensors"]  # its scales
        assert one["eqft_init/adapter_model.safetensors"] != other["eqft_init/adapter_model.safetensors"]
        for row, now in zip(plain.layers, last.report.layers, strict=True):
            assert row.error != now.error
            assert row.error_start != now.error_start
        # What the layers' outputs are off by was not measured again.
        assert {row.output_error for row in last.report.layers} == {None}
        assert "output_error" not in last.report.totals

    def test_it_is_refused_where_it_does_not(self, strong_llama, tmp_path, monkeypatch):
        plain = quantize(strong_llama, tmp_path / "plain", **FEW)
        monkeypatch.setattr("qinit.runner.polished.polish", partial(polish, learning_rate=0.0, stretch_rate=0.0))
        *events, last = events_of(strong_llama, tmp_path / "out", polish=3)
        note = "polish: did not lower the held-out loss, so the adapters stay as they were"
        assert Noted(note) in events
        assert note in last.report.notes
        assert not last.report.totals["calibration"]["polish"]["kept"]
        assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "out")
        errors = [[(row.error, row.output_error) for row in report.layers] for report in (plain, last.report)]
        assert errors[0] == errors[1]
        assert "| polish | 3 steps, nothing gained |\n" in (tmp_path / "out/README.md").read_text()

    def test_a_kept_layer_keeps_its_fresh_adapter(self, tmp_path):
        source = make_checkpoint(tmp_path / "m", intermediate_size=80, initializer_range=0.1)
        quantize(source, tmp_path / "out", **POLISHED)
        factors = safetensors.torch.load_file(tmp_path / "out/eqft_init/adapter_model.safetensors")
        name = "base_model.model.model.layers.0.mlp.up_proj"
        assert factors[f"{name}.lora_A.weight"].any()
        assert not factors[f"{name}.lora_B.weight"].any()
        assert len(factors) == 28
