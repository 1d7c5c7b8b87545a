import pytest
import torch

from qinit.events import Noted, Sampling
from qinit.runner import job as module
from tests.helpers import exhausted, plan_of
from tests.jobs import crashing, job_at

FEW = {"calibration_samples": 4, "calibration_length": 16}


@pytest.fixture
def drawn(monkeypatch):
    """Count how often a text is drawn or written."""
    calls, real = [], module.text_for
    monkeypatch.setattr(module, "text_for", lambda *arguments: calls.append(1) or real(*arguments))
    return calls


class TestSamples:
    def test_they_are_drawn_once_and_said(self, llama, tmp_path, drawn):
        with job_at(plan_of(llama, calibration="random", **FEW), tmp_path / "out") as job:
            samples, events = exhausted(job.samples())
            assert events == [Sampling("random")]
            assert samples.tokens.shape == (4, 16)
            assert exhausted(job.samples()) == (samples, [])
        assert len(drawn) == 1

    def test_a_run_that_goes_on_reads_what_was_kept(self, llama, tmp_path, drawn):
        plan = plan_of(llama, calibration="self", **FEW)
        with crashing(plan, tmp_path / "out") as job:
            before, _ = exhausted(job.samples())
        with job_at(plan, tmp_path / "out") as job:
            again, events = exhausted(job.samples())
        assert torch.equal(again.tokens, before.tokens)
        assert again.origin == before.origin
        assert events == []
        assert len(drawn) == 1

    def test_without_calibration_the_model_writes_what_widths_are_measured_on(self, llama, tmp_path):
        with job_at(plan_of(llama, ratio=0.5), tmp_path / "out") as job:
            samples, events = exhausted(job.samples())
        assert events == [Sampling("self")]
        assert "the model wrote itself" in samples.origin


class TestNotes:
    def test_one_is_written_down_once_and_said_each_time(self, llama, tmp_path):
        with job_at(plan_of(llama), tmp_path / "out") as job:
            assert [job.note(text) for text in ("a", "b", "a")] == [Noted("a"), Noted("b"), Noted("a")]
            assert job.notes == ["a", "b"]

    def test_those_of_the_run_that_is_gone_on_with_stay(self, llama, tmp_path):
        plan = plan_of(llama, calibration="self", **FEW)
        with crashing(plan, tmp_path / "out") as job:
            exhausted(job.samples())  # else nothing is worth keeping
            job.note("before")
        with job_at(plan, tmp_path / "out") as job:
            job.note("after")
            assert job.notes == ["before", "after"]


class TestOutputMetrics:
    def test_they_are_measured_once_where_the_method_needs_them(self, llama, tmp_path, monkeypatch):
        measured, real = [], module.output_metrics
        monkeypatch.setattr(module, "output_metrics", lambda *arguments: measured.append(1) or real(*arguments))
        plan = plan_of(llama, calibration="random", **FEW)
        with job_at(plan, tmp_path / "out") as job:
            metrics, events = exhausted(job.output_metrics())
            assert metrics.keys() == {layer.target.name for layer in plan.quantized}
            assert Sampling("random") in events
            again, events = exhausted(job.output_metrics())
            assert again is metrics
            assert events == []
        assert len(measured) == 1

    def test_a_method_that_does_not_has_none_and_reads_no_text(self, llama, tmp_path, drawn):
        with job_at(plan_of(llama, calibration="random", method="cloq", **FEW), tmp_path / "out") as job:
            assert exhausted(job.output_metrics()) == ({}, [])
        assert drawn == []


def test_nothing_is_laid_out_before_the_widths_are_known(llama, tmp_path):
    with job_at(plan_of(llama), tmp_path / "out") as job:
        assert list(job.place.run.iterdir()) == []
        assert job.store is job.store
        assert (job.place.run / "model.safetensors").is_file()
