import pytest
import torch

from qinit.calibration import choice
from qinit.calibration.choice import calibration_cost, choose, expected
from qinit.plan import make_plan
from qinit.recipe import make_recipe
from qinit.words import duration
from tests.qinit.calibration.models import make
from tests.qinit.calibration.tiny import make_bert, make_reader

CPU = torch.device("cpu")


def plan_of(source, **options):
    """A plan with no calibration yet, as `choose` is asked about it."""
    options = {"calibration": "none", "format": "dense", "rank": 4, **options}
    return make_plan(make_recipe(model=str(source), **options), source, source.name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_reader(tmp_path_factory.mktemp("llama") / "llama")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of 10 GFlop/s with 8 GB free."""
    monkeypatch.setattr(choice, "measured_speed", lambda device: 1e10)
    monkeypatch.setattr(choice, "free_memory", lambda device: 8 * 10**9)


class TestChoose:
    def test_a_small_causal_model_writes_its_own_text(self, llama):
        source, reason = choose(plan_of(llama), CPU)
        assert source == "self"
        assert "text that the model writes itself" in reason

    def test_the_plan_does_what_was_chosen_and_says_why(self, llama, monkeypatch):
        plan = plan_of(llama, calibration="auto")
        assert plan.recipe.calibration == "self"
        assert any(note.startswith("calibration self: ") for note in plan.notes)
        monkeypatch.setattr(choice, "LONGEST", 0.0)
        plan = plan_of(llama, calibration="auto")
        assert plan.recipe.calibration == "none"
        assert any(note.startswith("no calibration: ") for note in plan.notes)

    def test_an_encoder_writes_nothing(self, tmp_path):
        source, reason = choose(plan_of(make_bert(tmp_path / "bert")), CPU)
        assert source == "none"
        assert "--calibration FILE" in reason

    def test_without_a_token_to_start_from_nothing_is_written(self, tmp_path):
        plan = plan_of(make(tmp_path / "m", "llama", bos_token_id=None, eos_token_id=None))
        assert choose(plan, CPU)[0] == "none"

    @pytest.mark.parametrize(("times", "expected"), [(1.9, "none"), (2.1, "self")])
    def test_the_model_must_fit_into_half_of_the_free_memory(self, times, expected, llama, monkeypatch):
        plan = plan_of(llama)
        monkeypatch.setattr(choice, "free_memory", lambda device: int(times * plan.bytes_before))
        source, reason = choose(plan, CPU)
        assert source == expected
        assert ("GB that are free" in reason) is (expected == "none")

    def test_it_must_not_take_longer_than_a_user_waits_unasked(self, llama, monkeypatch):
        plan = plan_of(llama)
        seconds = calibration_cost(plan, "self", choice.NOMINAL_SPEED["cpu"]).seconds
        monkeypatch.setattr(choice, "LONGEST", 0.99 * seconds)
        source, reason = choose(plan, CPU)
        assert source == "none"
        here = duration(calibration_cost(plan, "self", 1e10).seconds)  # what the fixture's machine reaches
        assert f"would take about {here} here" in reason
        monkeypatch.setattr(choice, "LONGEST", 1.01 * seconds)
        assert choose(plan, CPU)[0] == "self"

    def test_a_busy_machine_chooses_as_an_idle_one(self, llama, monkeypatch):
        monkeypatch.setattr(choice, "measured_speed", lambda device: 1e6)
        assert choose(plan_of(llama), CPU)[0] == "self"

    def test_published_methods_get_none(self, llama):
        assert choose(plan_of(llama, method="loftq"), CPU) == ("none", "method loftq takes none")


class TestCost:
    @pytest.fixture
    def cost(self, llama):
        base = {"calibration_samples": 64, "calibration_length": 64}
        return lambda source="self", speed=1e10, **options: calibration_cost(
            plan_of(llama, **{**base, **options}), source, speed
        )

    def test_text_that_is_there_costs_nothing_to_write(self, cost):
        assert cost("text.txt").writing == 0
        assert cost("text.txt").measuring == cost("self").measuring
        assert cost("self").seconds == cost("self").writing + cost("self").measuring > cost("text.txt").seconds

    def test_measuring_grows_with_the_tokens_and_falls_with_the_speed(self, cost):
        plain = cost("random").measuring
        assert cost("random", calibration_samples=128).measuring == pytest.approx(2 * plain)
        assert cost("random", calibration_length=32).measuring == pytest.approx(plain / 2)
        assert cost("random", speed=4e10).measuring == pytest.approx(plain / 4)
        assert cost("random", calibration_mode="parallel").measuring < plain / 2

    def test_writing_grows_with_the_tokens(self, cost):
        assert cost(calibration_samples=640).writing > 5 * cost().writing
        assert cost(calibration_length=128).writing > 1.9 * cost().writing

    def test_samples_longer_than_the_model_takes_count_as_they_will_be(self, cost):
        assert cost(calibration_length=128) == cost(calibration_length=4096)

    def test_a_larger_model_costs_more(self, llama, tmp_path):
        larger = plan_of(make_reader(tmp_path / "larger", num_hidden_layers=4))
        for source in ("self", "random"):
            assert (
                calibration_cost(larger, source, 1e10).seconds
                > 1.5 * calibration_cost(plan_of(llama), source, 1e10).seconds
            )

    def test_only_the_chosen_layers_are_measured(self, llama, cost):
        part = plan_of(llama, target_modules="q_proj", calibration_samples=64, calibration_length=64)
        assert calibration_cost(part, "random", 1e10).measuring < cost("random").measuring / 4


class TestExpected:
    def test_nothing_is_said_without_calibration(self, llama):
        assert expected(plan_of(llama, calibration="none"), CPU) == ()

    def test_the_text_and_the_polish_are_told_apart(self, llama, monkeypatch):
        monkeypatch.setattr(choice, "measured_speed", lambda device: 1e7)
        lines = expected(plan_of(llama, calibration="self", polish=50), CPU)
        assert len(lines) == 2
        assert "of it to write the text" in lines[0]
        assert lines[1].startswith("50 steps of polish take about ")
        (line,) = expected(plan_of(llama, calibration="random"), CPU)
        assert "write the text" not in line

    def test_more_steps_take_longer(self, llama, monkeypatch):
        monkeypatch.setattr(choice, "measured_speed", lambda device: 1e7)
        few, many = (expected(plan_of(llama, calibration="random", polish=n), CPU)[1] for n in (10, 1000))
        assert few.removeprefix("10") != many.removeprefix("1000")
