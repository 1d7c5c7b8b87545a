import pytest
import torch

from qinit.linalg.low_rank import LowRank
from qinit.train.bases import CodedBase, DenseBase
from qinit.train.repaired import FLOOR, Repaired
from tests.helpers import gauss
from tests.qinit.train.test_bases import coded, stretched


def factors(rows=24, columns=40, rank=4, seed=1):
    return LowRank(gauss(rows, rank, seed=seed), gauss(rank, columns, seed=seed + 1))


def layer(weight, low_rank, bias=None):
    return Repaired(DenseBase(weight), bias, low_rank)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "base",
    [
        DenseBase(gauss(24, 40)),
        DenseBase(gauss(24, 40).bfloat16()),
        CodedBase(coded()),
        stretched(CodedBase(coded(8))),
    ],
)
def test_it_computes_with_q_and_the_product(base, bias):
    low_rank, x = factors(), gauss(3, 5, 40, seed=9)
    added = gauss(24, seed=7) if bias else None
    found = Repaired(base, added, low_rank)
    Q = base.weight(torch.float32)
    expected = x @ (Q + low_rank.B @ low_rank.A).T + (0 if added is None else added)
    torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(found.weight, Q)


def test_in_bfloat16_it_computes_so_and_the_factors_stay_in_float32():
    found, x = Repaired(CodedBase(coded()), None, factors()), gauss(5, 40)
    y = found(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert found.A.dtype == found.B.dtype == found.base.stretch.dtype == torch.float32
    wanted = found(x).detach()
    torch.testing.assert_close(y.detach().float(), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in found.parameters())


def test_factors_and_scales_are_trained_and_nothing_else():
    assert {name for name, _ in Repaired(CodedBase(coded()), gauss(24), factors()).named_parameters()} == {
        *("A", "B", "base.stretch")
    }
    assert {name for name, _ in layer(gauss(24, 40), factors(), gauss(24)).named_parameters()} == {"A", "B"}


def test_without_factors_it_is_q_alone_and_nothing_of_it_is_trained():
    base, x = gauss(24, 40), gauss(5, 40, seed=9)
    found = layer(base, None)
    torch.testing.assert_close(found(x), x @ base.T)
    assert list(found.parameters()) == []
    assert found.sizes() == []


@pytest.mark.parametrize("shape", [(24, 40, 4), (40, 24, 24), (1, 8, 1)])
def test_both_factors_start_with_the_roots_of_the_singular_values(shape):
    low_rank = factors(*shape)
    found = layer(torch.zeros(shape[:2]), LowRank(100 * low_rank.B, low_rank.A / 100))
    B, A = found.B.detach(), found.A.detach()
    torch.testing.assert_close(B @ A, low_rank.B @ low_rank.A, rtol=1e-3, atol=1e-3)
    values = torch.linalg.svdvals(low_rank.B @ low_rank.A)[: shape[2]]
    torch.testing.assert_close(A @ A.T, values.clamp(min=FLOOR * values[0]).diag(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((B.T @ B).diagonal()[0], values[0], rtol=1e-3, atol=0)


def test_a_direction_that_holds_nothing_is_not_dead():
    low_rank = factors()
    low_rank.B[:, 2] = low_rank.B[:, 1]
    low_rank.A[2] = low_rank.A[1]  # rank 3
    found = layer(gauss(24, 40), low_rank)
    norms = found.A.detach().norm(dim=1)
    assert float(norms.min()) >= 0.99 * (FLOOR * float(norms.max()) ** 2) ** 0.5
    torch.testing.assert_close((found.B @ found.A).detach(), low_rank.B @ low_rank.A, rtol=1e-3, atol=1e-3)


def test_a_plain_lora_start_takes_its_size_from_q():
    sizes = []
    for scale in (1.0, 100.0):
        found = layer(scale * gauss(24, 40), LowRank(torch.zeros(24, 4), gauss(4, 40)))
        assert not found.B.any()
        assert found.A.any()
        sizes.append(found.size)
    assert sizes[1] == pytest.approx(10 * sizes[0], rel=1e-4)


def test_the_size_of_a_factor_is_that_of_its_entries():
    small, large = (layer(gauss(24, 40), LowRank(scale * factors().B, factors().A)).sizes() for scale in (1.0, 16.0))
    for (one, size), (other, four_times) in zip(small, large, strict=True):
        assert one.shape == other.shape
        assert four_times == pytest.approx(4 * size, rel=1e-3)
    for parameter, size in small:
        assert size == pytest.approx(float(parameter.detach().square().mean().sqrt()), rel=1e-3)
