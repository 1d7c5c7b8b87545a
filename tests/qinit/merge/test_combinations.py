import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qinit.merge.combinations import COMBINATIONS, PRUNING, Factors, combined
from tests.helpers import gauss

OUT, IN, RANK = 24, 32, 4


def factors(seed, rank=RANK, scale=2.0):
    return Factors(gauss(rank, IN, seed=seed), gauss(OUT, rank, seed=seed + 1), scale)


def added(one):
    return one.scale * one.B @ one.A


def moved(start, seed, size=0.1):
    return Factors(start.A + size * gauss(*start.A.shape, seed=seed), start.B + size * gauss(*start.B.shape), 2.0)


def by_peft(adapters, weights, how, density, seed):
    """What PEFT's own method makes of the same adapters on a model of one layer."""
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    configs = [LoraConfig(r=a.rank, lora_alpha=a.scale * a.rank, target_modules=["0"]) for a in adapters]
    model = get_peft_model(model, configs[0], "0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    layer = model.base_model.model[0]
    for number, each in enumerate(adapters):
        layer.lora_A[str(number)].weight.data = each.A
        layer.lora_B[str(number)].weight.data = each.B
    inject = model.base_model.inject_adapter

    def seeded(*arguments):  # it draws a start for the new adapter
        inject(*arguments)
        torch.manual_seed(seed)

    model.base_model.inject_adapter = seeded
    names = [str(number) for number in range(len(adapters))]
    model.base_model.add_weighted_adapter(names, list(weights), "all", combination_type=how, density=density)
    return layer.get_delta_weight("all").detach(), layer.lora_A["all"].weight.detach()


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.5)])
@pytest.mark.parametrize("how", COMBINATIONS)
def test_without_a_start_it_is_what_peft_gives(how, weights):
    adapters = [factors(1), factors(5, scale=0.5)] if how != "svd" else [factors(1), factors(5, rank=6)]
    density = 0.4 if how in PRUNING else None
    theirs, A = by_peft(adapters, weights, how, density, seed=3)
    found = combined(how, adapters, weights, None, density, seed=3)
    assert found.scale == 1
    torch.testing.assert_close(added(found), theirs, rtol=1e-5, atol=1e-4)
    if how != "svd":
        assert torch.equal(found.A, A)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("how", COMBINATIONS)
def test_where_training_added_nothing_the_start_is_there_once(how, weights):
    start, density = factors(1), 0.5 if how in PRUNING else None
    found = combined(how, [start, start], weights, start, density, seed=0)
    torch.testing.assert_close(added(found), added(start), rtol=1e-4, atol=1e-4)
    assert (found.scale, found.rank) == (start.scale, start.rank)
    naive, _ = by_peft([start, start], weights, "linear", None, seed=0)
    times = sum(weight**0.5 for weight in weights) ** 2  # 1.92, 2 and 4
    torch.testing.assert_close(naive, times * added(start), rtol=1e-4, atol=1e-4)


def test_linear_adds_what_training_added_in_first_order_whatever_the_weights_add_up_to():
    start = factors(1)
    adapters = [moved(start, seed, size=1e-3) for seed in (7, 8)]
    for weights in ((0.7, 0.3), (1.0, 1.0)):
        expected = sum(w * (added(each) - added(start)) for w, each in zip(weights, adapters, strict=True))
        found = added(combined("linear", adapters, weights, start, None, 0)) - added(start)
        assert (found - expected).norm() < 2e-3 * expected.norm()


def test_svd_is_exact_where_the_rank_holds_it():
    start = factors(1)
    other = Factors(start.A, start.B + gauss(OUT, RANK, seed=9), start.scale)  # the same rows: rank 4 holds the sum
    another = Factors(start.A, start.B + gauss(OUT, RANK, seed=11), start.scale)
    expected = added(other) + added(another) - added(start)
    found = combined("svd", [other, another], (1.0, 1.0), start, None, 0)
    torch.testing.assert_close(added(found), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.A @ found.A.T, found.B.T @ found.B, rtol=0, atol=1e-3)  # balanced


@pytest.mark.parametrize("how", ["ties", "magnitude_prune"])
def test_of_what_training_added_the_smallest_values_are_dropped_and_the_start_is_whole(how):
    start = factors(1)
    adapters = [moved(start, seed) for seed in (7, 8)]
    found = combined(how, adapters, (1.0, 1.0), start, 0.25, 0)
    kept = (found.A != start.A).float().mean()
    assert 0.25 <= kept <= 0.5
    largest = torch.stack([each.A - start.A for each in adapters]).abs().amax(0).flatten().argmax()
    assert found.A.flatten()[largest] != start.A.flatten()[largest]


def test_what_dare_drops_follows_from_the_seed_alone():
    start = factors(1)
    adapters = [moved(start, seed) for seed in (7, 8)]
    state = torch.get_rng_state()
    one, same, other = (combined("dare_ties", adapters, (1.0, 1.0), start, 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(one.A, same.A)
    assert not torch.equal(one.A, other.A)
    assert torch.equal(torch.get_rng_state(), state)
