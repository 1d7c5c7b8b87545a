import pytest
import torch
from torch import nn

from qinit.snndlft.importance import MIX, LayerGradients, choose
from qinit.snndlft.layers import Layer


def layer(name, *values):
    parameter = nn.Parameter(torch.zeros(len(values), 1))
    parameter.grad = torch.tensor(values)[:, None] if values else None
    return Layer(name, {name: {"lora_E": parameter}})


def test_magnitude_and_uncertainty_are_smoothed_and_a_layer_that_waits_keeps_them():
    found = LayerGradients(0.8, 0.5)
    found.update([layer("a", 3.0, 4.0), layer("b", 1.0)])
    rms = (25 / 2) ** 0.5
    assert found.magnitude == pytest.approx({"a": 0.2 * rms, "b": 0.2})
    assert found.uncertainty == pytest.approx({"a": 0.5 * 0.8 * rms, "b": 0.5 * 0.8})
    found.update([layer("a", 1.0), layer("b")])
    assert found.magnitude == pytest.approx({"a": 0.16 * rms + 0.2, "b": 0.2})


def test_importance_is_a_mix_of_shares():
    found = LayerGradients(0.85, 0.85)
    found.magnitude, found.uncertainty = {"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 2.0}
    assert sum(MIX.values()) == 1
    mixed = found.mixed({"a": 4.0, "b": 1.0})
    assert mixed == pytest.approx(
        {"a": 0.5 * 0.8 + 0.25 * 0.25 + 0.25 * 0.5, "b": 0.5 * 0.2 + 0.25 * 0.75 + 0.25 * 0.5}
    )
    assert LayerGradients(0.85, 0.85).mixed({"a": 0.0, "b": 0.0}) == {"a": 0, "b": 0}


@pytest.mark.parametrize(
    ("layer_wise", "chosen"), [("single", ["c"]), ("half", ["a", "c", "d"]), ("all", ["a", "b", "c", "d", "e"])]
)
def test_the_best_layers_train_on(layer_wise, chosen):
    assert choose({"a": 2.0, "b": 1.0, "c": 5.0, "d": 3.0, "e": 2.0}, layer_wise) == chosen
