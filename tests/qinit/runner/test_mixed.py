import pytest

from qinit.errors import RecipeError
from qinit.events import Allotted, Measuring
from qinit.runner.mixed import choose_widths
from qinit.workplace.kept import save_samples
from qinit.workplace.place import kept
from tests.broken_off import RUNS, Crash, finish, result_in, undisturbed
from tests.helpers import calibrated_plan, exhausted, plan_of, random_samples
from tests.jobs import crashing, job_at


def test_the_run_s_plan_gets_the_widths_that_a_measurement_has_chosen(llama, tmp_path):
    plan = calibrated_plan(llama, ratio=0.5)
    assert plan.pending
    with job_at(plan, tmp_path / "out") as job:
        save_samples(job.place, job.journal, random_samples(4), written=False)
        _, events = exhausted(choose_widths(job))
        assert any(isinstance(event, Measuring) for event in events)
        assert events[-1] == Allotted(job.plan)
        assert not job.plan.pending
        assert {layer.bits for layer in job.plan.quantized} == {2, 3}
        widths = [layer.bits for layer in job.plan.quantized]
        job.plan = plan  # as after a crash
        _, events = exhausted(choose_widths(job))
        assert [layer.bits for layer in job.plan.quantized] == widths
        assert not any(isinstance(event, Measuring) for event in events)


def test_a_measurement_that_lacks_a_layer_is_not_gone_on_with(llama, tmp_path):
    plan = plan_of(llama, ratio=0.5)
    with crashing(plan, tmp_path / "out") as job:
        exhausted(choose_widths(job))
        measured = job.journal.find("sensitivity")["measured"]
        del measured["layers"][plan.layers[5].target.name]
        job.journal.append({"kind": "sensitivity", "measured": measured})
    with job_at(plan, tmp_path / "out") as job, pytest.raises(RecipeError, match=plan.layers[5].target.name):
        exhausted(choose_widths(job))


def test_sensitivities_are_not_measured_again(strong_llama, place, monkeypatch):
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
    assert result_in(place / "out") == wanted
