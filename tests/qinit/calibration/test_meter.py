import pytest
import torch

from qinit.calibration.meter import Gap, Meter, Original
from qinit.calibration.shards import SPARE
from qinit.files.tensors import StoredTensor
from qinit.plan.parts import LayerPlan
from qinit.source.targets import LinearModule, Target
from tests.helpers import gauss

CPU = torch.device("cpu")


def layer(name: str = "q", out_features: int = 5, in_features: int = 6) -> LayerPlan:
    tensor = StoredTensor.__new__(StoredTensor)  # never read
    return LayerPlan(Target(LinearModule(name, out_features, in_features, False), tensor), 2, 6, 1, None, ())


WRITES = {"q": None, "k": "input", "v": "output"}
OUT = {"q": 5, "k": 3, "v": 3}


def originals(**weights):
    return {name: Original(weight, WRITES[name]) for name, weight in weights.items()}


@pytest.fixture(params=["wide", "narrow"])
def seen(request):
    """Return x [40, in], the gaps, the layers and their weights: wide layers, and such whose outputs are fewer than
    half of their inputs."""
    size = 6 if request.param == "wide" else 30
    x, gap = gauss(40, size), Gap(gauss(40, size, seed=1), gauss(40, 3, seed=2), gauss(40, 3, seed=3))
    layers = [layer(name, out_features=OUT[name], in_features=size) for name in WRITES]
    return x, gap, layers, {name: gauss(OUT[name], size, seed=4) for name in WRITES}


def part_of(gap, rows):
    return Gap(gap.x[rows], gap.start[rows], gap.end[rows])


@pytest.mark.parametrize("sizes", [(40,), (7, 30, 3), (1,) * 40, (0, 40, 0)])
def test_batches_of_any_size_add_up_to_the_mean_over_all_tokens(seen, sizes):
    x, gap, layers, weights = seen
    meter = Meter(layers, CPU, originals(**weights))
    first = 0
    for size in sizes:
        part = slice(first, first + size)
        meter.add(x[part], part_of(gap, part))
        first += size
    missing = {"q": gap.x @ weights["q"].T, "k": gap.x @ weights["k"].T + gap.start, "v": gap.end}
    for member in layers:
        found = meter.statistics(member)
        assert found.tokens == 40
        torch.testing.assert_close(found.hessian, x.T @ x / 40)
        torch.testing.assert_close(found.magnitude, x.abs().mean(0))
        torch.testing.assert_close(found.drift, missing[member.target.name].T @ x / 40)
        assert found.fisher is None
    assert meter.statistics(layers[0]).hessian is meter.statistics(layers[1]).hessian


def test_shards_are_summed_alone_and_added_up_in_order(seen):
    x, gap, layers, weights = seen
    meter, parts = Meter(layers, CPU, originals(**weights)), []
    for shard, part in enumerate((slice(0, 7), slice(7, 8), slice(8, 40))):
        alone = Meter(layers, CPU, originals(**weights))
        for one in (part,) if shard else (slice(0, 3), slice(3, 7)):
            meter.add(x[one], part_of(gap, one), shard)
            alone.add(x[one], part_of(gap, one))
        parts.append((part.stop - part.start, alone))
    meter.add(x, gap, SPARE)  # does not count
    for member in layers:
        found = meter.statistics(member)
        assert found.tokens == 40
        for name in ("hessian", "magnitude"):
            total, tokens = torch.zeros(()), 0
            for count, alone in parts:
                tokens += count
                own = getattr(alone.statistics(member), name)
                total = total * ((tokens - count) / tokens) + own * (count / tokens)
            torch.testing.assert_close(getattr(found, name), total, rtol=1e-6, atol=1e-7)
        missing = {"q": gap.x @ weights["q"].T, "k": gap.x @ weights["k"].T + gap.start, "v": gap.end}
        torch.testing.assert_close(found.drift, missing[member.target.name].T @ x / 40)


def test_a_layer_s_statistics_are_the_same_each_time_they_are_asked_for(seen):
    x, gap, layers, weights = seen
    meter = Meter(layers, CPU, originals(**weights))
    meter.add(x, gap)
    first = [meter.statistics(member).drift.clone() for member in layers]
    assert all(torch.equal(meter.statistics(member).drift, drift) for member, drift in zip(layers, first, strict=True))


def test_batches_whose_gap_is_not_told_count_as_none(seen):
    x, gap, layers, weights = seen
    meter = Meter(layers, CPU, originals(**weights))
    meter.add(x[:10], part_of(gap, slice(10)))
    meter.add(x[10:])
    expected = (gap.x[:10] @ weights["q"].T).T @ x[:10] / 40
    torch.testing.assert_close(meter.statistics(layers[0]).drift, expected)


def test_without_an_original_there_is_no_drift():
    meter = Meter([layer()], CPU)
    meter.add(gauss(4, 6))
    assert meter.statistics(layer()).drift is None


def test_half_precision_activations_are_added_in_float32():
    x = gauss(3000, 6).bfloat16()
    meter = Meter([layer()], CPU)
    for part in x.split(100):
        meter.add(part)
    found = meter.statistics(layer())
    assert found.hessian.dtype == found.magnitude.dtype == torch.float32
    torch.testing.assert_close(found.hessian, (x.double().T @ x.double() / 3000).float(), rtol=1e-4, atol=1e-5)


def test_large_activations_do_not_overflow_while_they_add_up():
    meter = Meter([layer()], CPU)
    for _ in range(50):
        meter.add(torch.full((2, 6), 1e18))
    torch.testing.assert_close(meter.statistics(layer()).hessian, torch.full((6, 6), 1e36))


def test_a_layer_that_has_seen_nothing_has_no_statistics():
    meter = Meter([layer()], CPU)
    assert meter.statistics(layer()) is None
    for rows in (torch.empty(0, 6), torch.zeros(9, 6)):  # zeros say nothing either
        meter = Meter([layer()], CPU)
        meter.add(rows)
        assert meter.statistics(layer()) is None
