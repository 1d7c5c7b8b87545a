import pytest
import torch

from qinit.calibration.meter import Meter
from qinit.files.tensors import StoredTensor
from qinit.plan.plan import LayerPlan
from qinit.source.targets import LinearModule, Target
from tests.helpers import gauss

CPU = torch.device("cpu")


def layer(name: str = "q", out_features: int = 5, in_features: int = 6) -> LayerPlan:
    tensor = StoredTensor.__new__(StoredTensor)  # never read
    return LayerPlan(Target(LinearModule(name, out_features, in_features, False), tensor), 2, 6, 1, None, ())


@pytest.mark.parametrize("sizes", [(40,), (7, 30, 3), (1,) * 40, (0, 40, 0)])
def test_batches_of_any_size_add_up_to_the_mean_over_all_tokens(sizes):
    x, differences = gauss(40, 6), {"q": gauss(40, 5, seed=1), "k": gauss(40, 3, seed=2)}
    layers = [layer("q"), layer("k", out_features=3)]
    meter = Meter(layers, CPU, drift=True)
    first = 0
    for size in sizes:
        part = slice(first, first + size)
        meter.add(x[part], {name: d[part] for name, d in differences.items()})
        first += size
    for member in layers:
        found = meter.statistics(member)
        assert found.tokens == 40
        torch.testing.assert_close(found.hessian, x.T @ x / 40)
        torch.testing.assert_close(found.magnitude, x.abs().mean(0))
        torch.testing.assert_close(found.drift, differences[member.target.name].T @ x / 40)
        assert found.fisher is None
    assert meter.statistics(layers[0]).hessian is meter.statistics(layers[1]).hessian


def test_batches_without_a_difference_count_as_none():
    x, difference = gauss(40, 6), gauss(40, 5, seed=1)
    meter = Meter([layer()], CPU, drift=True)
    meter.add(x[:10], {"q": difference[:10]})
    meter.add(x[10:], {})
    torch.testing.assert_close(meter.statistics(layer()).drift, difference[:10].T @ x[:10] / 40)


def test_without_drift_there_is_none_and_differences_are_ignored():
    meter = Meter([layer()], CPU, drift=False)
    meter.add(gauss(4, 6), {"q": gauss(4, 5)})
    assert meter.statistics(layer()).drift is None


def test_half_precision_activations_are_added_in_float32():
    x = gauss(3000, 6).bfloat16()
    meter = Meter([layer()], CPU, drift=False)
    for part in x.split(100):
        meter.add(part, {})
    found = meter.statistics(layer())
    assert found.hessian.dtype == found.magnitude.dtype == torch.float32
    torch.testing.assert_close(found.hessian, (x.double().T @ x.double() / 3000).float(), rtol=1e-4, atol=1e-5)


def test_large_activations_do_not_overflow_while_they_add_up():
    meter = Meter([layer()], CPU, drift=False)
    for _ in range(50):
        meter.add(torch.full((2, 6), 1e18), {})
    torch.testing.assert_close(meter.statistics(layer()).hessian, torch.full((6, 6), 1e36))


def test_a_layer_that_has_seen_nothing_has_no_statistics():
    meter = Meter([layer()], CPU, drift=True)
    assert meter.statistics(layer()) is None
    meter.add(torch.empty(0, 6), {"q": torch.empty(0, 5)})
    assert meter.statistics(layer()) is None
    meter.add(torch.zeros(9, 6), {"q": torch.zeros(9, 5)})  # zeros say nothing either
    assert meter.statistics(layer()) is None
    meter.add(torch.ones(1, 6), {"q": torch.zeros(1, 5)})
    assert meter.statistics(layer()).tokens == 10
