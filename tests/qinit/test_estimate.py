import pytest
import torch

from qinit import estimate as module
from qinit.estimate import estimate
from qinit.plan import make_plan
from qinit.recipe import make_recipe
from qinit.solver.methods import METHODS

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
    calibrated = METHODS[method].metric != "weight"
    assert seconds(method=method, calibration="random" if calibrated else "none").solving > 0


def test_more_inputs_take_more_than_their_share_with_calibration_only(tiny_llama):
    def spec(calibration):
        recipe = make_recipe(model=str(tiny_llama), calibration=calibration, format="dense")
        plan = make_plan(recipe, tiny_llama, "tiny")
        return plan.layer_spec(plan.quantized[0])

    assert module._cost(spec("none"), 100, 8000) == 2 * module._cost(spec("none"), 100, 4000)
    assert module._cost(spec("random"), 100, 8000) == 3 * module._cost(spec("random"), 100, 4000)
