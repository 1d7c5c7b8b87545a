from dataclasses import replace

import pytest
import torch

from qinit.solver.methods import METHODS
from qinit.solver.residual import as_loaded, residual_norm
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec
from tests.helpers import gauss
from tests.layers import of_kind
from tests.qinit.solver.test_calibrated import measured, true_output_error
from tests.qinit.solver.test_calibrated import spec as calibrated

DATA_FREE = [name for name, row in METHODS.items() if not row.needs]


def spec(method="eqft", bits=2, rank=8, group_size=64, iterations=None, storage=None) -> LayerSpec:
    row = METHODS[method]
    return LayerSpec(row, bits, group_size, rank, iterations or row.iterations, storage)


def product(solution) -> torch.Tensor:
    return solution.low_rank.B.double() @ solution.low_rank.A.double()


def true_error(weight, solution, layer_spec) -> float:
    """||W - Q - BA|| / ||W|| from the returned parts alone, in float64."""
    rest = weight.double() - as_loaded(solution.quantized, layer_spec).double()
    if solution.low_rank is not None:
        rest -= product(solution)
    return float(rest.norm() / weight.double().norm())


@pytest.mark.parametrize("storage", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_reported_errors_are_those_of_what_is_returned(method, bits, storage):
    weight, layer_spec = of_kind("heavy-tailed"), spec(method, bits, storage=storage)
    solution = solve(weight, layer_spec)
    assert solution.error == pytest.approx(true_error(weight, solution, layer_spec), rel=1e-5)
    alone = true_error(weight, replace(solution, low_rank=None), layer_spec)
    assert solution.quantized_error == pytest.approx(alone, rel=1e-5)
    rest = weight - as_loaded(solution.quantized, layer_spec)
    expected = solution.error * float(weight.double().norm())
    assert residual_norm(rest, solution.low_rank) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", DATA_FREE)
def test_the_same_call_gives_the_same_bits_whatever_ran_before(method):
    weight = of_kind("normal")
    one = solve(weight, spec(method), seed=7)
    torch.manual_seed(123)
    solve(of_kind("heavy-tailed", seed=1), spec(method), seed=8)
    two = solve(weight, spec(method), seed=7)
    assert torch.equal(one.quantized.codes, two.quantized.codes)
    assert torch.equal(one.quantized.scales, two.quantized.scales)
    assert one.error == two.error
    if one.low_rank is not None:
        assert torch.equal(one.low_rank.A, two.low_rank.A)
        assert torch.equal(one.low_rank.B, two.low_rank.B)


def test_solving_leaves_the_weight_and_the_global_random_state_alone():
    weight = of_kind("normal")
    kept, state = weight.clone(), torch.get_rng_state()
    solve(weight, spec("eqft"), seed=3)
    assert torch.equal(weight, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_output_error_of_a_tall_layer_is_close_though_not_of_all_its_rows():
    weight, statistics = gauss(1100, 32, scale=0.02), measured(32)
    solution = solve(weight, calibrated(3), statistics=statistics)
    expected = true_output_error(weight, solution, calibrated(3), statistics.hessian)
    assert solution.output_error == pytest.approx(expected, rel=0.05)


def test_a_row_that_needs_statistics_says_so():
    with pytest.raises(ValueError, match="needs statistics"):
        solve(gauss(16, 64, scale=0.02), calibrated(rank=2))


def test_at_rank_0_q_alone_is_as_close_as_it_can_be():
    weight, layer_spec = of_kind("heavy-tailed"), spec(bits=3, rank=0, storage=torch.bfloat16)
    solution = solve(weight, layer_spec)
    assert solution.low_rank is None
    assert solution.error == solution.quantized_error == pytest.approx(true_error(weight, solution, layer_spec))
    assert solution.error <= solve(weight, replace(layer_spec, rank=8)).quantized_error


def test_at_rank_0_inputs_are_looked_at_too():
    weight, statistics = of_kind("heavy-tailed"), measured(128)
    layer_spec = replace(calibrated(bits=3), rank=0)
    solution = solve(weight, layer_spec, 0, statistics)
    plain = solve(weight, replace(spec(bits=3, rank=0), group_size=layer_spec.group_size))
    assert solution.low_rank.B.shape == (len(weight), 0)
    assert solution.output_error == solution.quantized_output_error
    H = statistics.hessian.double()
    errors = [weight.double() - as_loaded(each.quantized, layer_spec).double() for each in (solution, plain)]
    found, without = (float(((E @ H) * E).sum()) for E in errors)
    assert found < 0.8 * without
