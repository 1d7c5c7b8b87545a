import pytest
import torch

from qinit.planner import time as module
from qinit.planner.make import make_plan
from qinit.planner.time import calibration_cost, estimate, expected
from qinit.recipe import make_recipe
from qinit.solver.methods import METHODS
from tests.helpers import plan_of
from tests.models import make_reader

CPU = torch.device("cpu")


@pytest.fixture
def seconds(tiny_llama, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_SAMPLE", 128)
    monkeypatch.setattr(module, "measured_speed", lambda _device: 1e9)

    def call(**options):
        options = {"calibration": "none", "rank": 4, "format": "dense", **options}
        return estimate(make_plan(make_recipe(model=str(tiny_llama), **options), tiny_llama, "tiny"), CPU)

    return call


def test_without_calibration_all_the_time_is_the_solver_s(seconds):
    found = seconds()
    assert found.solving > 0
    assert found.calibrating == found.allocating == found.polishing == 0
    assert found.total == found.solving


def test_what_else_is_asked_for_takes_its_time(seconds):
    found = seconds(calibration="random", polish=5)
    assert min(found.calibrating, found.solving, found.polishing) > 0
    one, two = ({"calibration": "random", "calibration_samples": count} for count in (128, 256))
    walk = [seconds(method="cloq", **options).calibrating for options in (one, two)]
    assert walk[1] > 1.9 * walk[0]
    back = [seconds(**options).calibrating - there for options, there in zip((one, two), walk, strict=True)]
    assert 0 < back[0] == pytest.approx(back[1])  # the pass back takes a part of the text only
    assert seconds(calibration="random", polish=50).polishing == pytest.approx(10 * found.polishing)


def test_widths_still_to_be_chosen_are_measured_first(seconds):
    assert seconds(ratio=0.5).allocating > 0
    assert seconds(ratio=0.5, allocation="first").allocating == 0


@pytest.mark.parametrize("method", [name for name in METHODS if name != "eqft"])
def test_every_method_can_be_estimated(seconds, method):
    calibrated = bool(METHODS[method].needs)
    assert seconds(method=method, calibration="random" if calibrated else "none").solving > 0


def test_more_inputs_take_more_than_their_share_with_calibration_only(tiny_llama):
    def spec(calibration):
        recipe = make_recipe(model=str(tiny_llama), calibration=calibration, format="dense")
        plan = make_plan(recipe, tiny_llama, "tiny")
        return plan.layer_spec(plan.quantized[0])

    assert module._cost(spec("none"), 100, 8000) == 2 * module._cost(spec("none"), 100, 4000)
    assert module._cost(spec("random"), 100, 8000) == 3 * module._cost(spec("random"), 100, 4000)


class TestCost:
    @pytest.fixture
    def cost(self, reader):
        base = {"calibration_samples": 64, "calibration_length": 64}
        return lambda source="self", speed=1e10, **options: calibration_cost(
            plan_of(reader, **{**base, **options}), source, speed
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

    def test_a_larger_model_costs_more(self, reader, tmp_path):
        larger = plan_of(make_reader(tmp_path / "larger", num_hidden_layers=4))
        for source in ("self", "random"):
            assert (
                calibration_cost(larger, source, 1e10).seconds
                > 1.5 * calibration_cost(plan_of(reader), source, 1e10).seconds
            )

    def test_only_the_chosen_layers_are_measured(self, reader, cost):
        part = plan_of(reader, target_modules="q_proj", calibration_samples=64, calibration_length=64)
        assert calibration_cost(part, "random", 1e10).measuring < cost("random").measuring / 4


class TestExpected:
    def test_nothing_is_said_without_calibration(self, reader):
        assert expected(plan_of(reader, calibration="none"), CPU) == ()

    def test_the_text_and_the_polish_are_told_apart(self, reader, monkeypatch):
        monkeypatch.setattr(module, "measured_speed", lambda device: 1e7)
        lines = expected(plan_of(reader, calibration="self", polish=50), CPU)
        assert len(lines) == 2
        assert "of it to write the text" in lines[0]
        assert lines[1].startswith("50 steps of polish take about ")
        (line,) = expected(plan_of(reader, calibration="random"), CPU)
        assert "write the text" not in line

    def test_more_steps_take_longer(self, reader, monkeypatch):
        monkeypatch.setattr(module, "measured_speed", lambda device: 1e7)
        few, many = (expected(plan_of(reader, calibration="random", polish=n), CPU)[1] for n in (10, 1000))
        assert few.removeprefix("10") != many.removeprefix("1000")
