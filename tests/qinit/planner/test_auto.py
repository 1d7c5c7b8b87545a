import pytest
import torch

from qinit.planner import auto as choice
from qinit.planner.auto import choose
from qinit.planner.time import calibration_cost
from qinit.words import duration
from tests.helpers import plan_of
from tests.models import make_bert, make_float32

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of 10 GFlop/s with 8 GB free."""
    monkeypatch.setattr(choice, "measured_speed", lambda device: 1e10)
    monkeypatch.setattr(choice, "free_memory", lambda device: 8 * 10**9)


class TestChoose:
    def test_a_small_causal_model_writes_its_own_text(self, reader):
        source, reason = choose(plan_of(reader), CPU)
        assert source == "self"
        assert "text that the model writes itself" in reason

    def test_the_plan_does_what_was_chosen_and_says_why(self, reader, monkeypatch):
        plan = plan_of(reader, calibration="auto")
        assert plan.recipe.calibration == "self"
        assert any(note.startswith("calibration self: ") for note in plan.notes)
        monkeypatch.setattr(choice, "LONGEST", 0.0)
        plan = plan_of(reader, calibration="auto")
        assert plan.recipe.calibration == "none"
        assert any(note.startswith("no calibration: ") for note in plan.notes)

    def test_an_encoder_writes_nothing(self, tmp_path):
        source, reason = choose(plan_of(make_bert(tmp_path / "bert"), format="dense"), CPU)
        assert source == "none"
        assert "--calibration FILE" in reason

    def test_without_a_token_to_start_from_nothing_is_written(self, tmp_path):
        plan = plan_of(make_float32(tmp_path / "m", "llama", bos_token_id=None, eos_token_id=None))
        assert choose(plan, CPU)[0] == "none"

    @pytest.mark.parametrize(("times", "expected"), [(1.9, "none"), (2.1, "self")])
    def test_the_model_must_fit_into_half_of_the_free_memory(self, times, expected, reader, monkeypatch):
        plan = plan_of(reader)
        monkeypatch.setattr(choice, "free_memory", lambda device: int(times * plan.bytes_before))
        source, reason = choose(plan, CPU)
        assert source == expected
        assert ("GB that are free" in reason) is (expected == "none")

    def test_it_must_not_take_longer_than_a_user_waits_unasked(self, reader, monkeypatch):
        plan = plan_of(reader)
        seconds = calibration_cost(plan, "self", choice.NOMINAL_SPEED["cpu"]).seconds
        monkeypatch.setattr(choice, "LONGEST", 0.99 * seconds)
        source, reason = choose(plan, CPU)
        assert source == "none"
        here = duration(calibration_cost(plan, "self", 1e10).seconds)  # what the fixture's machine reaches
        assert f"would take about {here} here" in reason
        monkeypatch.setattr(choice, "LONGEST", 1.01 * seconds)
        assert choose(plan, CPU)[0] == "self"

    def test_a_busy_machine_chooses_as_an_idle_one(self, reader, monkeypatch):
        monkeypatch.setattr(choice, "measured_speed", lambda device: 1e6)
        assert choose(plan_of(reader), CPU)[0] == "self"

    def test_published_methods_get_none(self, reader):
        assert choose(plan_of(reader, method="loftq", format="dense"), CPU) == ("none", "method loftq takes none")
