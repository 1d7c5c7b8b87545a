"""Products with slices of 3-D parameters, in the ways that models write them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from qinit.source.products import Products, one_by_one, stacked_parameters
from tests.helpers import gauss

EXPERTS, INPUTS, OUTPUTS, TOKENS = 3, 4, 5, 2
STACK = gauss(EXPERTS, OUTPUTS, INPUTS)  # slices [out, in]
TURNED = STACK.mT.contiguous()  # slices [in, out]
X = gauss(TOKENS, INPUTS, seed=1)
ALL = gauss(EXPERTS, TOKENS, INPUTS, seed=2)

# How a model computes expert 1 of either parameter.
ONE = {
    "linear": (STACK, False, lambda w: functional.linear(X, w[1])),
    "a number that is a tensor": (STACK, False, lambda w: functional.linear(X, w[torch.tensor(1)])),
    "unbound": (STACK, False, lambda w: functional.linear(X, w.unbind()[1])),
    "selected": (STACK, False, lambda w: functional.linear(X, w.select(0, 1))),
    "turned first": (STACK, False, lambda w: X @ w[1].T),
    "the whole turned": (STACK, False, lambda w: X @ w.transpose(1, 2)[1]),
    "in another type": (STACK, False, lambda w: functional.linear(X, w[1].detach().to(torch.float64).float())),
    "matmul": (TURNED, True, lambda w: X @ w[1]),
    "linear of what is turned": (TURNED, True, lambda w: functional.linear(X, w[1].mT)),
    "with a bias": (TURNED, True, lambda w: torch.addmm(torch.zeros(OUTPUTS), X, w[1])),
}


@pytest.mark.parametrize("way", ONE)
def test_a_product_with_a_slice_is_seen_with_its_tokens(way):
    parameter, turned, compute = ONE[way]
    seen = []
    with Products({"w": parameter}, lambda product: seen.append(product)) as mode:
        result = compute(parameter)
    (product,) = seen
    assert (product.parameter, product.index, product.turned) == ("w", 1, turned)
    assert torch.equal(product.x.float(), X)
    assert not mode.unknown
    assert torch.allclose(result.float(), X @ STACK[1].T, atol=1e-5)


def test_a_batched_product_is_one_for_every_slice():
    seen = []
    with Products({"w": TURNED}, lambda product: seen.append(product)) as mode:
        result = torch.bmm(ALL, TURNED)
    assert [(product.index, product.turned) for product in seen] == [(i, True) for i in range(EXPERTS)]
    assert all(torch.equal(product.x, x) for product, x in zip(seen, ALL, strict=True))
    assert torch.allclose(result, ALL @ TURNED)
    assert not mode.unknown


def test_a_result_may_be_put_in_the_place_of_the_product():
    with Products({"w": STACK}, lambda product: torch.full((len(product.x), OUTPUTS), 7.0)):
        assert bool((functional.linear(X[None], STACK[0]) == 7).all())
    with Products({"w": STACK}, given=lambda products, y: y + products[0].index):
        found = functional.linear(X, STACK[2])
    assert torch.allclose(found, X @ STACK[2].T + 2)


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w[[0, 1]],
        lambda w: torch.einsum("ti,eoi->eto", X, w),
        lambda w: w.sum(),
        lambda w: w[1] * 2,
        lambda w: w[1] @ TURNED[0],
    ],
)
def test_what_else_reads_a_parameter_is_named(compute):
    with Products({"w": STACK}) as mode:
        compute(STACK)
    assert "w" in mode.unknown or compute(STACK) is None


def test_shapes_and_other_tensors_are_no_business_of_its():
    with Products({"w": STACK}, lambda product: pytest.fail("no product")) as mode:
        assert STACK.shape[0] == EXPERTS
        assert STACK.dtype == torch.float32
        X @ TURNED[0]
    assert not mode.unknown


def test_only_own_parameters_of_three_dimensions_are_stacked():
    class Own(nn.Module):
        pass

    module = Own()
    module.experts, module.flat = nn.Parameter(STACK.clone()), nn.Parameter(X.clone())
    module.single = nn.Parameter(STACK[:1].clone())
    module.inner = nn.Conv1d(2, 2, 3)
    assert list(stacked_parameters(module)) == ["experts"]
    assert stacked_parameters(module.inner) == {}


def test_the_way_of_computing_is_put_back():
    model = nn.Module()
    model.config = type("Config", (), {"_experts_implementation": "grouped_mm"})()
    with one_by_one(model):
        assert model.config._experts_implementation == "eager"
    assert model.config._experts_implementation == "grouped_mm"
