from itertools import pairwise

import pytest
import torch

from qinit.linalg.low_rank import (
    COLD_STEPS,
    LowRank,
    OutputMetric,
    full_svd,
    output_subspace,
    random_basis,
    subspace,
    truncated,
)
from qinit.linalg.weighting import closed_form
from tests.helpers import gauss
from tests.layers import decaying, fading, output_error

SHAPES = [(48, 32), (32, 48), (64, 64), (200, 20), (20, 200)]


def approximate(matrix, rank, steps=COLD_STEPS):
    return subspace(matrix, rank, random_basis(matrix.shape[1], rank, 0, matrix.device), steps)


def energy(matrix: torch.Tensor, rank: int) -> float:
    """What Eckart-Young allows: the sum of the leading squared singular values, in float64."""
    return float(torch.linalg.svdvals(matrix.double())[:rank].square().sum())


def assert_balanced(approximation, captured):
    """B^T B = A A^T = diag(S), S descending, and the sum of S^2 is the captured energy."""
    B, A = approximation.factors.B, approximation.factors.A
    left, right = B.T @ B, A @ A.T
    largest = float(left.diagonal().max())
    torch.testing.assert_close(left, torch.diag(left.diagonal()), rtol=0, atol=1e-5 * largest)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * largest)
    assert (left.diagonal().diff() <= 1e-5 * largest).all()
    assert float(left.diagonal().square().sum()) == pytest.approx(captured, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_full_svd_captures_all_that_the_rank_allows(shape, rank):
    matrix = gauss(*shape)
    approximation = full_svd(matrix, rank)
    best = energy(matrix, rank)
    assert approximation.captured == pytest.approx(best, rel=1e-5)
    rest = (matrix - approximation.factors.B @ approximation.factors.A).double().square().sum()
    assert float(rest) == pytest.approx(float(matrix.double().square().sum()) - best, rel=1e-4)
    assert_balanced(approximation, best)


@pytest.mark.parametrize(("shape", "rank"), [((48, 32), 4), ((6, 32), 4), ((32, 6), 9)])
def test_a_product_is_truncated_as_its_full_svd_is(shape, rank):
    B, A = gauss(shape[0], 12), gauss(12, shape[1], seed=1)
    found, expected = truncated(LowRank(B, A), rank), full_svd(B @ A, rank).factors
    assert (found.B.shape, found.A.shape) == ((shape[0], rank), (rank, shape[1]))
    torch.testing.assert_close(found.B @ found.A, expected.B @ expected.A, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.B.T @ found.B, found.A @ found.A.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_subspace_iteration_captures_nearly_as_much(shape, rank):
    for matrix, least in ((decaying(*shape), 0.9999), (gauss(*shape), 0.97)):
        approximation = approximate(matrix, rank)
        assert approximation.factors.B.shape == (shape[0], rank)
        assert approximation.factors.A.shape == (rank, shape[1])
        best = energy(matrix, rank)
        assert least * best <= approximation.captured <= best * (1 + 1e-5)
        assert_balanced(approximation, approximation.captured)


def test_captured_energy_is_what_the_product_takes_from_the_matrix():
    matrix = gauss(48, 32)
    approximation = approximate(matrix, 4)
    rest = (matrix - approximation.factors.B @ approximation.factors.A).double().square().sum()
    assert float(rest) == pytest.approx(float(matrix.double().square().sum()) - approximation.captured, rel=1e-5)


def test_more_steps_never_capture_less():
    matrix = gauss(64, 64)
    captured = [approximate(matrix, 8, steps).captured for steps in (1, 2, 4, 8, 16)]
    assert all(later >= earlier * (1 - 1e-6) for earlier, later in pairwise(captured))
    assert captured[-1] >= 0.999 * energy(matrix, 8)


def test_one_step_from_a_nearby_matrix_s_basis_is_enough():
    matrix = decaying(96, 64)
    nearby = matrix + 0.01 * gauss(96, 64, seed=5) / 8
    start = approximate(matrix, 8)
    best = energy(nearby, 8)
    warm = subspace(nearby, 8, start.basis, steps=1)
    cold = approximate(nearby, 8, steps=1)
    assert warm.captured >= 0.999 * best
    assert warm.captured > cold.captured


@pytest.mark.parametrize("method", [full_svd, approximate])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8), (1, 16), (16, 1), (1, 1)])
def test_at_full_rank_nothing_is_left(method, shape):
    matrix = gauss(*shape)
    factors = method(matrix, min(shape)).factors
    torch.testing.assert_close(factors.B @ factors.A, matrix, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", [full_svd, approximate])
def test_a_matrix_of_lower_rank_is_reproduced(method):
    matrix = gauss(48, 3) @ gauss(3, 32, seed=1)
    approximation = method(matrix, 8)
    factors = approximation.factors
    assert torch.isfinite(factors.A).all()
    assert torch.isfinite(factors.B).all()
    torch.testing.assert_close(factors.B @ factors.A, matrix, rtol=0, atol=1e-4)
    assert torch.isfinite(approximation.basis).all()


@pytest.mark.parametrize("method", [full_svd, approximate])
def test_a_zero_matrix_gives_zero_factors_and_a_usable_basis(method):
    approximation = method(torch.zeros(48, 32), 4)
    assert not (approximation.factors.B @ approximation.factors.A).any()
    assert approximation.captured == 0
    assert torch.isfinite(approximation.basis).all()


def test_the_basis_of_a_zero_matrix_can_start_the_next_search():
    basis = approximate(torch.zeros(48, 32), 4).basis
    matrix = decaying(48, 32)
    assert subspace(matrix, 4, basis, COLD_STEPS).captured >= 0.99 * energy(matrix, 4)


def test_random_bases_depend_on_the_seed_alone():
    one, same, other = (random_basis(64, 4, seed, torch.device("cpu")) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape[0] == 64
    assert one.shape[1] >= 4
    assert random_basis(6, 16, 0, torch.device("cpu")).shape == (6, 6)


def test_the_same_input_gives_the_same_bits():
    matrix = gauss(64, 48)
    one, two = approximate(matrix, 8), approximate(matrix, 8)
    assert torch.equal(one.factors.A, two.factors.A)
    assert torch.equal(one.factors.B, two.factors.B)


def fit_output(residual, hessian, rank, steps=12):
    return output_subspace(residual, hessian, rank, random_basis(residual.shape[1], rank, 0, residual.device), steps)


OUTPUT_SHAPES = [(48, 32), (32, 48), (64, 64), (100, 20), (20, 100), (6, 40)]


@pytest.mark.parametrize("tokens", [7, 400])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shape", OUTPUT_SHAPES)
def test_the_output_subspace_is_the_optimum_of_the_closed_form(shape, rank, tokens):
    residual, hessian = decaying(*shape), fading(shape[1], tokens)
    approximation = fit_output(residual, hessian, rank)
    B, A = approximation.factors.B, approximation.factors.A
    assert (B.shape, A.shape) == ((shape[0], rank), (rank, shape[1]))
    best = closed_form(residual, hessian, rank)
    found = output_error(residual - B @ A, hessian)
    expected = output_error(residual - best.B @ best.A, hessian)
    whole = output_error(residual, hessian)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6 * whole)
    assert approximation.captured == pytest.approx(whole - found, rel=1e-4)
    # The same function of the inputs, too, not only as good a one.
    torch.testing.assert_close(B @ A @ hessian, best.B @ best.A @ hessian, rtol=0, atol=0.02 * float(hessian.max()))


@pytest.mark.parametrize("tokens", [7, 400])
def test_the_output_factors_have_equal_norms_and_rows_of_one_length(tokens):
    factors = fit_output(decaying(48, 32), fading(32, tokens), 4).factors
    left, right = factors.B.T @ factors.B, factors.A @ factors.A.T
    assert float(left.trace()) == pytest.approx(float(right.trace()), rel=1e-4)
    torch.testing.assert_close(left, torch.diag(left.diagonal()), rtol=0, atol=1e-5 * float(left.max()))
    torch.testing.assert_close(right, right[0, 0] * torch.eye(4), rtol=0, atol=1e-5 * float(right[0, 0]))
    assert (left.diagonal().diff() < 0).all()


def test_the_output_factors_of_nothing_are_finite():
    factors = fit_output(torch.zeros(48, 32), fading(32, 400), 4).factors
    assert not factors.B.any()
    assert torch.isfinite(factors.A).all()


def output_metric(rows: int, directions: int, seed: int = 0) -> OutputMetric:
    return OutputMetric(gauss(directions, rows, seed=seed), 0.1 + gauss(rows, 1, seed=seed + 1)[:, 0].square())


def two_sided(matrix: torch.Tensor, metric: OutputMetric, hessian: torch.Tensor) -> float:
    """tr(G M H M'), float64."""
    matrix, G = matrix.double(), metric.times(torch.eye(len(metric.rest))).double()
    return float(((G @ matrix @ hessian.double()) * matrix).sum())


@pytest.mark.parametrize("tokens", [7, 400])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shape", OUTPUT_SHAPES)
def test_under_a_metric_of_outputs_it_is_the_optimum_of_that_closed_form(shape, rank, tokens):
    residual, hessian, metric = decaying(*shape), fading(shape[1], tokens), output_metric(shape[0], 5)
    basis = random_basis(shape[1], rank, 0, residual.device)
    found = output_subspace(residual, hessian, rank, basis, 20, metric)
    G = metric.times(torch.eye(shape[0])).double()
    torch.testing.assert_close(
        G, metric.leading.T.double() @ metric.leading.double() + metric.rest.double().diag(), rtol=1e-5, atol=1e-5
    )
    values, vectors = torch.linalg.eigh(G)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    best = closed_form((root @ residual.double()).float(), hessian, rank)
    B = (inverse @ best.B.double()).float()
    left = two_sided(residual - found.factors.B @ found.factors.A, metric, hessian)
    whole = two_sided(residual, metric, hessian)
    expected = two_sided(residual - B @ best.A, metric, hessian)
    assert left == pytest.approx(expected, rel=1e-3, abs=1e-6 * whole)
    assert found.captured == pytest.approx(whole - left, rel=1e-4)
    plain = output_subspace(residual, hessian, rank, basis, 20).factors
    assert left <= two_sided(residual - plain.B @ plain.A, metric, hessian) * (1 + 1e-4)
    # Factors as without a metric: orthogonal, A's rows of one length, both of one norm.
    columns, rows = found.factors.B.T @ found.factors.B, found.factors.A @ found.factors.A.T
    assert float(columns.trace()) == pytest.approx(float(rows.trace()), rel=1e-4)
    torch.testing.assert_close(columns, columns.diagonal().diag(), rtol=0, atol=1e-5 * float(columns.max()))
    torch.testing.assert_close(rows, rows[0, 0] * torch.eye(rank), rtol=0, atol=1e-5 * float(rows[0, 0]))


def test_a_metric_that_is_the_identity_changes_nothing():
    residual, hessian = decaying(48, 32), fading(32, 400)
    basis = random_basis(32, 4, 0, residual.device)
    identity = OutputMetric(torch.zeros(3, 48), torch.ones(48))
    plain, found = (output_subspace(residual, hessian, 4, basis, 12, metric) for metric in (None, identity))
    torch.testing.assert_close(found.factors.B @ found.factors.A, plain.factors.B @ plain.factors.A, rtol=0, atol=1e-4)


def test_under_the_identity_the_output_subspace_is_the_svd():
    matrix = decaying(48, 32)
    found, best = fit_output(matrix, torch.eye(32), 4), full_svd(matrix, 4)
    assert found.captured == pytest.approx(best.captured, rel=1e-4)
    torch.testing.assert_close(found.factors.B @ found.factors.A, best.factors.B @ best.factors.A, rtol=0, atol=2e-3)


def test_more_steps_at_the_output_never_capture_less():
    residual, hessian = gauss(64, 48), fading(48, 400)
    captured = [fit_output(residual, hessian, 6, steps).captured for steps in (1, 2, 4, 8, 16)]
    assert all(later >= earlier * (1 - 1e-5) for earlier, later in pairwise(captured))


def test_a_nearby_matrix_s_basis_starts_the_output_search_well():
    residual, hessian = decaying(96, 64), fading(64, 500)
    start = fit_output(residual, hessian, 6)
    nearby = residual + 0.01 * gauss(96, 64, seed=5) / 8
    best = closed_form(nearby, hessian, 6)
    most = output_error(nearby, hessian) - output_error(nearby - best.B @ best.A, hessian)
    warm = output_subspace(nearby, hessian, 6, start.basis)
    assert warm.captured >= 0.999 * most
    assert warm.captured > fit_output(nearby, hessian, 6, steps=1).captured


@pytest.mark.parametrize("zero", ["residual", "hessian"])
def test_nothing_at_the_output_gives_finite_factors_and_a_usable_basis(zero):
    residual, hessian = decaying(48, 32), fading(32, 400)
    empty = output_subspace(
        residual * (zero != "residual"), hessian * (zero != "hessian"), 4, random_basis(32, 4, 0, residual.device), 3
    )
    assert empty.captured == 0
    assert all(torch.isfinite(part).all() for part in (empty.factors.A, empty.factors.B, empty.basis))
    if zero == "residual":
        assert not (empty.factors.B @ empty.factors.A).any()
    again = output_subspace(residual, hessian, 4, empty.basis, 12)
    assert again.captured == pytest.approx(fit_output(residual, hessian, 4).captured, rel=1e-3)
