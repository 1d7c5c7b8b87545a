from dataclasses import replace

import pytest
import torch

from qinit.planner import polish as module
from qinit.planner.memory import polishing_bytes
from qinit.planner.nominal import polishing_seconds
from qinit.planner.polish import BUDGET, MOST_STEPS, choose_polish
from tests.helpers import plan_of
from tests.models import make_bert

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(module, "total_memory", lambda device: 8 * 10**9)


def steps(source, device=CPU, **options):
    return choose_polish(plan_of(source, **{"calibration": "random", "quality": "best", **options}), device)


@pytest.mark.parametrize(
    ("quality", "device", "expected"),
    [
        ("fast", CPU, 0),
        ("fast", GPU, 0),
        ("balanced", CPU, 0),
        ("balanced", GPU, MOST_STEPS["balanced"]),
        ("best", CPU, MOST_STEPS["best"]),
        ("best", GPU, MOST_STEPS["best"]),
    ],
)
def test_it_goes_by_the_quality_and_the_device(llama, quality, device, expected):
    found, reason = steps(llama, device, quality=quality)
    assert found == expected
    assert bool(reason) is bool(expected)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 400), (0.6, 200), (0.3, 100), (0.01, 0)])
def test_there_are_as_many_steps_as_the_budget_holds(llama, monkeypatch, share, expected):
    plan = plan_of(llama, calibration="random", quality="best")
    monkeypatch.setitem(BUDGET, "best", share * polishing_seconds(plan, 400))
    found, reason = choose_polish(plan, CPU)
    assert found == expected
    assert reason.startswith(f"{expected} steps, about" if expected else "none, 50 steps would take about")


def test_what_does_not_fit_into_the_memory_is_not_polished(llama, monkeypatch):
    needed = polishing_bytes(plan_of(llama, calibration="random", quality="best"))
    monkeypatch.setattr(module, "total_memory", lambda device: needed - 1)
    found, reason = steps(llama)
    assert found == 0
    assert "GB and the device has" in reason


@pytest.mark.parametrize(
    "options", [{"calibration": "none"}, {"method": "qlora", "format": "dense", "calibration": "none"}]
)
def test_without_calibration_there_is_none(llama, options):
    assert steps(llama, **options)[0] == 0


def test_an_encoder_has_none(tmp_path):
    assert steps(make_bert(tmp_path / "bert"), format="dense")[0] == 0


def test_a_plan_has_the_steps_and_the_reason(llama, monkeypatch):
    plan = plan_of(llama, calibration="random", quality="best")
    assert plan.recipe.polish == 400
    assert any(note.startswith("polish: 400 steps, about") for note in plan.notes)
    assert plan_of(llama, calibration="random", quality="best", polish=7).recipe.polish == 7
    assert plan_of(llama, calibration="random").recipe.polish == 0
    assert plan_of(llama, calibration="random", polish="auto").recipe.polish == 0


class TestText:
    def test_own_text_goes_on_with_what_qinit_brings(self, reader):
        plan = plan_of(reader, calibration="self", polish=1)
        assert (plan.recipe.calibration, plan.polish_source) == ("self", "text")
        assert plan_of(reader, calibration="self").polish_source == "self"  # there is no polish

    def test_without_a_tokenizer_it_is_own_text(self, llama):
        assert plan_of(llama, calibration="self", polish=1).polish_source == "self"

    @pytest.mark.parametrize("calibration", ["text", "random"])
    def test_else_it_is_the_source_of_the_calibration(self, reader, calibration):
        assert plan_of(reader, calibration=calibration, polish=1).polish_source == calibration

    def test_it_follows_what_auto_became_when_an_unfinished_run_was_started(self, reader):
        plan = plan_of(reader, calibration="auto", polish=1)
        for source, expected in (("self", "text"), ("random", "random")):
            then = replace(plan, recipe=plan.recipe.model_copy(update={"calibration": source}))
            assert then.polish_source == expected
