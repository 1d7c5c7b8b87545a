import numpy as np
import pytest
import torch

from qinit.linalg.weighting import Weighting, closed_form
from tests.helpers import gauss
from tests.layers import COLUMNS, RANK, ROWS, array, statistics, symmetric_root, weights


def loss(residual: torch.Tensor, hessian: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    error = residual.double() - B.double() @ A.double()
    return (error @ hessian.double() * error).sum()


@pytest.mark.parametrize("tokens", [20, 512])
@pytest.mark.parametrize("rank", [1, 8])
def test_nothing_near_the_closed_form_is_better(tokens, rank):
    residual, hessian = weights(), statistics(tokens=tokens).hessian
    factors = closed_form(residual, hessian, rank)
    least = float(loss(residual, hessian, factors.B, factors.A))
    for seed in range(20):
        for size in (1e-1, 1e-2, 1e-3):
            B = factors.B * (1 + size * gauss(ROWS, rank, seed=seed))
            A = factors.A * (1 + size * gauss(rank, COLUMNS, seed=seed + 50))
            assert float(loss(residual, hessian, B, A)) > least


@pytest.mark.parametrize("tokens", [5, 64])  # 5: H is singular
def test_the_closed_form_is_what_brute_force_finds(tokens):
    E, x = gauss(6, 8).double(), gauss(tokens, 8, seed=1).double()
    factors = closed_form(E.float(), (x.T @ x / tokens).float(), 2)

    def output_error(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        return ((E - B @ A) @ x.T).square().sum() / tokens

    found = []
    for seed in range(3):
        B = gauss(6, 2, seed=seed + 10).double().requires_grad_()
        A = gauss(2, 8, seed=seed + 20).double().requires_grad_()
        optimizer = torch.optim.LBFGS([B, A], max_iter=400, line_search_fn="strong_wolfe")

        def closure(B=B, A=A, optimizer=optimizer):
            optimizer.zero_grad()
            value = output_error(B, A)
            value.backward()
            return value

        optimizer.step(closure)
        found.append(float(output_error(B, A).detach()))
    assert min(found) == pytest.approx(float(output_error(factors.B.double(), factors.A.double())), rel=1e-4)


@pytest.mark.parametrize("tokens", [30, 512])
def test_the_closed_form_leaves_the_tail_of_the_scaled_residual(tokens):
    residual, hessian = weights(), statistics(tokens=tokens).hessian
    factors = closed_form(residual, hessian, RANK)
    values = np.linalg.svd(array(residual) @ symmetric_root(array(hessian)), compute_uv=False)
    tail = float((values[RANK:] ** 2).sum())
    assert float(loss(residual, hessian, factors.B, factors.A)) == pytest.approx(tail, rel=1e-3)


def test_where_the_inputs_never_go_the_closed_form_puts_nothing():
    residual, hessian = weights(), statistics(tokens=20).hessian
    factors = closed_form(residual, hessian, 16)
    values, vectors = np.linalg.eigh(array(hessian))
    null = vectors[:, values < 1e-6 * values[-1]]
    assert null.shape[1] == COLUMNS - 20
    assert np.abs(array(factors.A) @ null).max() <= 1e-5 * np.abs(array(factors.A)).max()
    assert float(loss(residual, hessian, factors.B, factors.A)) > 0


def test_more_rank_than_h_has_is_filled_with_zeros():
    factors = closed_form(weights(), statistics(tokens=3).hessian, RANK)
    assert factors.B.shape == (ROWS, RANK)
    assert factors.A.shape == (RANK, COLUMNS)
    assert not factors.A[3:].any()
    assert not factors.B[:, 3:].any()


@pytest.mark.parametrize("split", ["balanced", "A", "B"])
def test_the_split_moves_the_singular_values_and_not_the_product(split):
    residual, hessian = weights(), statistics().hessian
    weighting = Weighting.of_inputs(hessian)
    balanced, factors = closed_form(residual, hessian, RANK), closed_form(residual, hessian, RANK, split)
    torch.testing.assert_close(factors.B @ factors.A, balanced.B @ balanced.A, rtol=1e-4, atol=1e-6)
    S = torch.linalg.svdvals(weighting.scale(residual))[:RANK]
    left, right = {"balanced": (S, S), "A": (S**0, S**2), "B": (S**2, S**0)}[split]
    gram = factors.A.double() @ hessian.double() @ factors.A.double().T
    torch.testing.assert_close(factors.B.double().T @ factors.B.double(), left.diag(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gram, right.diag(), rtol=1e-4, atol=1e-4)


def test_channels_without_weight_are_not_divided_by():
    columns, rows = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 0.0])
    factors = Weighting.diagonal(columns, rows).fit(torch.ones(2, 3), 2)
    expected = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(factors.B @ factors.A, expected)
