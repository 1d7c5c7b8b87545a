import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qinit.errors import RecipeError
from qinit.planner.kinds import BLOCK, COSTS, PLACE, Kind, known, load_kind
from qinit.planner.operations import OPERATIONS
from tests.helpers import plan_of

MEASURED = {
    "device": "cuda",
    "card": {"name": "card", "TFLOP/s float32": 2.0, "GB/s copied": 100.0, "memory, GB": 80.0},
    "layers": {"4096 x 4096": 2.0, "1024 x 4096": 1.0, "14336 x 4096": 3.0, "4096 x 14336": 4.0, "32 blocks": 9.0},
    "calibrated layers": {"4096 x 4096": 20.0, "4096 x 14336": 100.0, "32 blocks": 9.0},
    "without data": {"4 blocks": 100.0, "a block": 20.0},
    "own text": {"4 blocks": 2 * 511 * 5.0},
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
    shapes = {"attention": (4, 8, 16), "product": (4, 8, 16), "recall": (4, 4, 2, 8, 16), "small": (100,)}
    for name in OPERATIONS:
        assert kind.seconds(name, shapes.get(name, (8, 16)), 2) == 2 * kind.seconds(name, shapes.get(name, (8, 16)))


def test_a_product_takes_its_arithmetic_or_its_bytes(kind):
    assert kind.seconds("product", (10**4, 10**4, 10**4)) == pytest.approx(1.0)
    assert kind.seconds("product", (1, 10**5, 10**5)) == pytest.approx(0.4, rel=0.01)


def test_a_step_of_text_takes_as_long_for_a_block_as_it_took(kind):
    assert kind.seconds("recall", (64, 32, 8, 256, 128), 10) == pytest.approx(10.0)


def test_a_layer_takes_what_the_nearest_one_took(kind, spec):
    free, calibrated = spec(), spec(calibration="random")
    assert kind.solving(free, 4096, 4096, 3) == pytest.approx(6.0)
    assert kind.solving(free, 8192, 14336) == pytest.approx(8.0)
    assert kind.solving(calibrated, 4096, 4096) == pytest.approx(20.0)
    assert kind.solving(replace(free, iterations=2 * free.method.iterations), 4096, 4096) == pytest.approx(4.0)


def test_what_a_block_takes_beside_its_layers_goes_to_the_files(kind, tiny_llama):
    made = plan_of(tiny_llama)
    layers, outside = 2 * 2.0 + 2 * 1.0 + 2 * 3.0 + 4.0, 20.0
    weights = sum(count * math.prod(shape) for shape, count in BLOCK.items())
    expected = (20.0 - layers) / weights * sum(layer.weights for layer in made.quantized)
    copied = sum(tensor.nbytes for tensor in made.untouched)
    assert kind.files(made) == pytest.approx(expected + outside * copied / (4 * 128256 * 4096))


def test_the_forward_pass_is_as_fast_as_it_was_measured():
    forward = {"TFLOP/s forward, of a block's matrix products": 20.0}
    assert Kind({**MEASURED, "calibrated": forward}).seconds("product", (10**4,) * 3) == pytest.approx(0.1)


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
