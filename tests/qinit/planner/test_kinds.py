import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qinit.errors import RecipeError
from qinit.planner.kinds import BLOCK, COSTS, PLACE, Kind, known, load_kind
from qinit.planner.operations import OPERATIONS, calibrated_cost
from tests.helpers import plan_of

# A layer takes a second, and another for 10^7 weights; a calibrated one of a square of 4096 took 9 s more than that.
LAYERS = {" x ".join(map(str, shape)): 1.0 + math.prod(shape) / 1e7 for shape in BLOCK}
CALIBRATED = sum(count * calibrated_cost(shape) for shape, count in BLOCK.items()) * 9 / calibrated_cost((4096, 4096))
MEASURED = {
    "device": "cuda",
    "card": {"name": "card", "TFLOP/s float32": 2.0, "GB/s copied": 100.0, "memory, GB": 80.0},
    "layers": {**LAYERS, "32 blocks": 9.0},
    "without data": {"2 blocks": 100.0, "a block more": 40.0},
    "calibrated": {
        "TFLOP/s forward, of a block's matrix products": 20.0,
        "split": {"solving": 4 * (CALIBRATED + sum(BLOCK.values()))},
    },
    "own text": {"2 blocks": 511 * 5.0, "a block more": 511.0},
}


@pytest.fixture
def kind():
    return Kind(MEASURED)


@pytest.fixture
def spec(tiny_llama):
    def give(**options):
        made = plan_of(tiny_llama, **options)
        return made.layer_spec(made.quantized[0])

    return give


def test_every_operation_has_its_cost(kind):
    assert COSTS.keys() == OPERATIONS.keys()
    shapes = {
        "attention": (4, 8, 16),
        "product": (4, 8, 16),
        "step": (4, 8, 16),
        "recall": (4, 4, 2, 8, 16),
        "small": (100,),
    }
    for name in OPERATIONS:
        assert kind.seconds(name, shapes.get(name, (8, 16)), 2) == 2 * kind.seconds(name, shapes.get(name, (8, 16)))


def test_a_product_takes_its_arithmetic_or_its_bytes(kind):
    assert kind.seconds("product", (10**4, 10**4, 10**4)) == pytest.approx(0.1)
    assert kind.seconds("product", (1, 10**5, 10**5)) == pytest.approx(0.4, rel=0.01)
    assert kind.seconds("moment", (10**4, 10**4)) == pytest.approx(1.0)  # no statistics in less than float32


def test_a_step_of_text_takes_what_it_took_for_each_block_and_around_them(kind):
    assert kind.seconds("recall", (64, 32, 8, 256, 128), 10) == pytest.approx(10.0)
    assert kind.seconds("draw", (64, 1000), 10) == pytest.approx(30.0)


def test_a_layer_takes_some_time_and_more_for_its_size(kind, spec):
    free, calibrated = spec(), spec(calibration="random")
    assert kind.solving(free, 1000, 10000, 3) == pytest.approx(6.0)
    assert kind.solving(free, 1, 1) == pytest.approx(1.0)
    assert kind.solving(calibrated, 4096, 4096) == pytest.approx(10.0)
    twice = replace(free, iterations=2 * free.method.iterations)
    assert kind.solving(twice, 1000, 10000) == pytest.approx(4.0)


def test_what_a_block_takes_beside_its_layers_goes_to_the_files(kind, tiny_llama):
    made = plan_of(tiny_llama)
    weights = sum(count * math.prod(shape) for shape, count in BLOCK.items())
    beside = 40.0 - sum(BLOCK.values()) - weights / 1e7
    copied = sum(tensor.nbytes for tensor in made.untouched)
    expected = beside / weights * sum(layer.weights for layer in made.quantized) + 20.0 * copied / (4 * 128256 * 4096)
    assert kind.files(made) == pytest.approx(expected)


def test_the_kinds_are_the_newest_measurements():
    assert known() == ["h100"]
    newest = Path(__file__).resolve().parents[3] / "model_zoo/results/gpu.json"
    assert "H100" in load_kind("h100").card.name
    if not newest.exists():
        pytest.skip(f"no {newest.name} among the results")
    kept = json.loads((PLACE / "h100.json").read_text())
    assert kept == json.loads(newest.read_text()), f"copy {newest.name} to {PLACE.name}/h100.json"


def test_another_kind_is_refused():
    with pytest.raises(RecipeError, match=r"no 'b200'; known are cpu, h100"):
        load_kind("b200")
