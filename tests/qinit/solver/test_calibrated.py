from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qinit.errors import QinitError
from qinit.grids import IntegerGrid
from qinit.linalg.hessian import corrected, damped_cholesky, output_norm
from qinit.processes.group import ALONE
from qinit.processes.rows import LEAST_ROWS
from qinit.solver.calibrated import DAMPING, FLOOR, SHRINKAGE, TOKENS_PER_INPUT, alternate, stable_hessian
from qinit.solver.methods import METHODS, get_method
from qinit.solver.residual import as_loaded
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec
from qinit.solver.statistics import Statistics
from tests.helpers import gauss, most_allocated
from tests.qinit.processes.together import in_threads

ROW = get_method("eqft", calibrated=True)


def measured(columns: int, tokens: int = 2000, seed: int = 0, **options) -> Statistics:
    """Statistics of inputs that are correlated and differ in size, as a layer's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * 0.93 ** torch.arange(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mixing.T
    x = x + 0.3 * torch.randn(tokens, columns, generator=generator)
    x *= 1 + 4 * (torch.rand(columns, generator=generator) > 0.9)
    return Statistics(x.T @ x / tokens, x.abs().mean(0), tokens, **options)


def stable(statistics: Statistics) -> torch.Tensor:
    with stable_hessian(statistics) as hessian:
        return hessian.clone()


def spec(bits=2, rank=8, group_size=64, iterations=ROW.iterations, storage=None, **changes) -> LayerSpec:
    return LayerSpec(replace(ROW, **changes), bits, group_size, rank, iterations, storage)


def data_free(bits=2, rank=8, storage=None) -> LayerSpec:
    return LayerSpec(METHODS["eqft"], bits, 64, rank, METHODS["eqft"].iterations, storage)


def true_output_error(weight, solution, layer_spec, hessian, *, adapter=True) -> float:
    """|| (W - Q - BA) x || / || W x || from the returned parts alone, in float64."""
    weight, hessian = weight.double(), hessian.double()
    rest = weight - as_loaded(solution.quantized, layer_spec).double()
    if adapter:
        rest = rest - solution.low_rank.B.double() @ solution.low_rank.A.double()
    return float((((rest @ hessian) * rest).sum() / ((weight @ hessian) * weight).sum()).sqrt())


def all_parts(solution) -> tuple[torch.Tensor, ...]:
    quantized, low_rank = solution.quantized, solution.low_rank
    return quantized.codes, quantized.scales, quantized.zeros, low_rank.B, low_rank.A


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_output_error_is_far_below_that_of_the_data_free_row(rank, bits):
    weight, statistics = gauss(96, 128, scale=0.02), measured(128)
    blind = true_output_error(weight, solve(weight, data_free(bits, rank)), data_free(bits, rank), statistics.hessian)
    layer_spec = spec(bits, rank)
    solution = solve(weight, layer_spec, statistics=statistics)
    assert true_output_error(weight, solution, layer_spec, statistics.hessian) < 0.75 * blind


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_the_reported_errors_are_those_of_what_is_returned(rounding, bits, storage):
    weight, statistics = gauss(96, 128, scale=0.02), measured(128)
    layer_spec = spec(bits, storage=storage, rounding=rounding)
    solution = solve(weight, layer_spec, statistics=statistics)
    expected = true_output_error(weight, solution, layer_spec, statistics.hessian)
    assert solution.output_error == pytest.approx(expected, rel=1e-4)
    alone = true_output_error(weight, solution, layer_spec, statistics.hessian, adapter=False)
    assert solution.quantized_output_error == pytest.approx(alone, rel=1e-4)
    rest = weight - as_loaded(solution.quantized, layer_spec)
    assert solution.quantized_error == pytest.approx(float(rest.norm() / weight.norm()), rel=1e-5)
    rest -= solution.low_rank.B @ solution.low_rank.A
    assert solution.error == pytest.approx(float(rest.norm() / weight.norm()), rel=1e-5)
    assert solution.output_error < solution.quantized_output_error


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_no_round_raises_the_error(bits, act_order):
    weight, statistics = gauss(64, 192, scale=0.02), measured(192)
    solution = solve(weight, spec(bits, iterations=6, act_order=act_order), statistics=statistics)
    assert len(solution.trace) == 6
    assert all(later <= earlier * 1.002 for earlier, later in pairwise(solution.trace))
    assert solution.trace[-1] < solution.trace[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_quantizing_first_leaves_little_to_the_adapter(bits, rounding):
    weight, statistics = gauss(96, 128, scale=0.02), measured(128)
    first, other = (
        solve(weight, spec(bits, rounding=rounding, start=start), statistics=statistics)
        for start in ("quantize", "low-rank")
    )
    for quantity in (output_norm, lambda matrix, _: float(matrix.norm())):
        carried = [quantity(s.low_rank.B @ s.low_rank.A, statistics.hessian) for s in (first, other)]
        assert carried[0] < (0.75 if bits == 2 else 0.7) * carried[1]
    assert first.output_error < 1.5 * other.output_error


@pytest.mark.parametrize(("rank", "start"), [(4, "quantize"), (10, "quantize"), (11, "low-rank")])
def test_the_order_is_that_of_the_row(rank, start):
    weight, statistics = gauss(64, 128, scale=0.02), measured(128)
    chosen, named = (
        all_parts(solve(weight, spec(rank=rank, **changes), statistics=statistics))
        for changes in ({}, {"start": start})
    )
    assert all(torch.equal(a, b) for a, b in zip(chosen, named, strict=True))


@pytest.mark.parametrize(
    ("start", "rounds", "roundings"),
    [("quantize", 1, 1), ("quantize", 2, 2), ("quantize", 3, 2), ("quantize", 5, 4), ("low-rank", 4, 1)],
)
def test_what_the_rounds_do(start, rounds, roundings, monkeypatch):
    steps = []
    for step in (IntegerGrid.round_gptq, IntegerGrid.descend):

        def noted(*args, step=step, **given):
            steps.append(step.__name__)
            return step(*args, **given)

        monkeypatch.setattr(IntegerGrid, step.__name__, noted)
    solution = solve(gauss(96, 128, scale=0.02), spec(iterations=rounds, start=start), statistics=measured(128))
    assert steps == ["round_gptq"] * roundings + ["descend"] * (rounds - roundings)
    assert len(solution.trace) == rounds


@pytest.mark.parametrize("bits", [2, 3])
def test_more_rounds_of_quantize_first_come_closer(bits):
    statistics, errors = measured(128), {}
    for rounds in (1, 3, 5):
        layer_spec = spec(bits, iterations=rounds)
        found = [solve(gauss(96, 128, seed=seed, scale=0.02), layer_spec, statistics=statistics) for seed in range(4)]
        errors[rounds] = sum(solution.output_error for solution in found)
    assert errors[5] < 0.99 * errors[3] < 0.95 * errors[1]


def test_the_second_rounding_of_quantize_first_comes_closer():
    statistics = measured(128)
    for seed in range(4):
        trace = solve(gauss(96, 128, seed=seed, scale=0.02), spec(start="quantize"), statistics=statistics).trace
        assert trace[1] < 0.98 * trace[0]


def test_the_trace_is_relative_to_the_target_under_the_stable_hessian():
    weight, statistics = gauss(48, 128, scale=0.02), measured(128, tokens=200)
    quantized, approximation, trace = alternate(weight, spec(), statistics, seed=0)
    rest = weight - as_loaded(quantized, spec()) - approximation.factors.B @ approximation.factors.A
    with stable_hessian(statistics) as hessian:
        expected = output_norm(rest, hessian) / output_norm(weight, hessian)
    assert trace[-1] == pytest.approx(expected, rel=1e-4)


def test_the_low_rank_is_the_best_for_the_returned_quantization():
    weight, statistics = gauss(64, 128, scale=0.02), measured(128)
    solution = solve(weight, spec(), statistics=statistics)
    rest = (weight - as_loaded(solution.quantized, spec())).double()
    hessian = stable(statistics).double()
    eigenvalues = torch.linalg.eigvalsh(rest @ hessian @ rest.T).flip(0)
    found = rest - solution.low_rank.B.double() @ solution.low_rank.A.double()
    left = float(((found @ hessian) * found).sum())
    assert float(eigenvalues[8:].sum()) * (1 - 1e-6) <= left <= 1.02 * float(eigenvalues[8:].sum())


def test_error_feedback_is_better_than_rounding_to_nearest():
    weight, statistics = gauss(64, 192, scale=0.02), measured(192)
    errors = {
        name: solve(weight, spec(3, rounding=name), statistics=statistics).output_error for name in ("gptq", "nearest")
    }
    assert errors["gptq"] < 0.85 * errors["nearest"]


class TestDrift:
    weight = gauss(48, 96, scale=0.02)
    shift = gauss(48, 96, seed=5, scale=0.02)
    clean = measured(96)

    def drifting(self) -> Statistics:
        """As if the inputs in front had lost what (W + shift) x would make good."""
        return replace(self.clean, drift=self.shift @ self.clean.hessian)

    def test_the_target_is_the_least_squares_one(self):
        H, D = stable(self.clean), self.drifting().drift
        damped = H.double() + DAMPING * H.diagonal().double().mean() * torch.eye(96, dtype=torch.float64)
        expected = self.weight + D.double() @ torch.linalg.inv(damped)
        found = corrected(self.weight, D, damped_cholesky(H, DAMPING))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("start", ["quantize", "low-rank"])
    @pytest.mark.parametrize("rounding", ["gptq", "nearest"])
    def test_no_drift_is_as_good_as_none(self, start, rounding):
        none = replace(self.clean, drift=torch.zeros(48, 96))
        solutions = [solve(self.weight, spec(start=start, rounding=rounding), statistics=s) for s in (self.clean, none)]
        assert all(torch.equal(a, b) for a, b in zip(*map(all_parts, solutions), strict=True))

    def test_the_solution_moves_towards_what_makes_it_good(self):
        layer_spec, H = spec(4, rank=16), self.clean.hessian
        outputs = {}
        for statistics in (self.clean, self.drifting()):
            solution = solve(self.weight, layer_spec, statistics=statistics)
            found = as_loaded(solution.quantized, layer_spec) + solution.low_rank.B @ solution.low_rank.A
            outputs[statistics.drift is None] = output_norm(self.weight + self.shift - found, H)
        assert outputs[False] < 0.55 * outputs[True]

    def test_one_that_is_for_this_solve_alone_gives_its_memory(self):
        kept, given = self.drifting(), self.drifting()
        before = kept.drift.clone()
        solutions = [solve(self.weight, spec(), statistics=s) for s in (kept, replace(given, own=True))]
        assert all(torch.equal(a, b) for a, b in zip(*map(all_parts, solutions), strict=True))
        assert torch.equal(kept.drift, before)
        assert not torch.equal(given.drift, before)

    def test_the_weight_is_left_alone(self):
        kept = self.weight.clone()
        solve(self.weight, spec(), statistics=self.drifting())
        solve(self.weight, spec(), statistics=self.clean)
        assert torch.equal(self.weight, kept)


class TestScarceStatistics:
    @pytest.mark.parametrize("tokens", [1, 2, 40])
    @pytest.mark.parametrize("rounding", ["gptq", "nearest"])
    @pytest.mark.parametrize("drift", [False, True])
    def test_fewer_tokens_than_inputs_still_give_a_solution(self, tokens, rounding, drift):
        weight, statistics = gauss(48, 128, scale=0.02), measured(128, tokens)
        if drift:
            statistics = replace(statistics, drift=gauss(48, 128, seed=3, scale=0.02) @ statistics.hessian)
        solution = solve(weight, spec(rounding=rounding), statistics=statistics)
        assert all(torch.isfinite(part.float()).all() for part in all_parts(solution))
        if not drift:
            assert solution.error < 1.0  # what was never seen is rounded too, not thrown away
            assert solution.output_error < solution.quantized_output_error

    def test_the_fewer_the_tokens_the_more_the_correlations_are_shrunk(self):
        statistics = measured(64, tokens=16)
        power = statistics.hessian.diagonal().clone()
        for tokens in (10**6, TOKENS_PER_INPUT * 64, 32, 16, 1, 0):
            kept = statistics.hessian.clone()
            added = stable(replace(statistics, tokens=tokens)) - statistics.hessian
            expected = (SHRINKAGE * power + FLOOR * power.mean()) * max(1, TOKENS_PER_INPUT * 64 / max(tokens, 1))
            torch.testing.assert_close(added, expected.diag(), rtol=1e-4, atol=1e-4)
            assert torch.equal(statistics.hessian, kept)

    def test_one_input_that_dwarfs_the_rest_does_not_drown_what_is_known_of_them(self):
        statistics = measured(96)
        scale = torch.ones(96)
        scale[7] = 5.0
        larger = replace(statistics, hessian=statistics.hessian * scale * scale[:, None])
        rest = torch.arange(96) != 7
        before, after = (stable(s)[rest][:, rest] for s in (statistics, larger))
        torch.testing.assert_close(after.diagonal(), before.diagonal(), rtol=0.1, atol=0)
        assert torch.equal(after - after.diagonal().diag(), before - before.diagonal().diag())

    @pytest.mark.parametrize("drift", [False, True])
    def test_inputs_that_are_always_zero_are_rounded_to_nearest(self, drift):
        statistics = Statistics(torch.zeros(96, 96), torch.zeros(96), 100, torch.zeros(32, 96) if drift else None)
        weight = gauss(32, 96, scale=0.02)
        solution = solve(weight, spec(3), statistics=statistics)
        assert all(torch.isfinite(part.float()).all() for part in all_parts(solution))
        assert solution.output_error == solution.quantized_output_error == 0.0
        assert solution.error < 0.4

    def test_some_inputs_that_are_always_zero(self):
        statistics = measured(96)
        statistics.hessian[:40] = 0
        statistics.hessian[:, :40] = 0
        solution = solve(gauss(32, 96, scale=0.02), spec(3, group_size=32), statistics=statistics)
        assert all(torch.isfinite(part.float()).all() for part in all_parts(solution))
        assert solution.error < 0.6

    def test_damaged_statistics_are_an_error(self):
        statistics = measured(32)
        statistics.hessian[0, 1] = statistics.hessian[1, 0] = 1e6
        with pytest.raises(QinitError, match="indefinite"):
            solve(gauss(16, 32, scale=0.02), spec(rank=2), statistics=statistics)


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_storage_in_bfloat16_is_part_of_the_fit(rounding):
    weight, statistics = gauss(64, 128, scale=0.02), measured(128)
    dense = spec(8, rank=32, storage=torch.bfloat16, rounding=rounding)
    aware = solve(weight, dense, statistics=statistics)
    unaware = solve(weight, replace(dense, storage=None), statistics=statistics)
    assert aware.output_error < true_output_error(weight, unaware, dense, statistics.hessian)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1), (3, 100), (40, 33)])
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_the_smallest_shapes_work_at_their_full_rank(shape, rounding):
    weight, statistics = gauss(*shape, scale=0.02), measured(shape[1])
    solution = solve(weight, spec(rank=min(shape), rounding=rounding), statistics=statistics)
    assert solution.output_error < 1e-3


def test_zero_weights_give_zero():
    solution = solve(torch.zeros(16, 64), spec(rank=4), statistics=measured(64))
    assert not as_loaded(solution.quantized, spec()).any()
    assert not (solution.low_rank.B @ solution.low_rank.A).any()
    assert solution.error == solution.output_error == 0.0


def test_the_same_call_gives_the_same_bits_and_seeds_hardly_matter():
    weight, statistics = gauss(64, 128, scale=0.02), measured(128)
    hessian, state = statistics.hessian.clone(), torch.get_rng_state()
    one = solve(weight, spec(), seed=7, statistics=statistics)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    two = solve(weight, spec(), seed=7, statistics=statistics)
    assert all(torch.equal(a, b) for a, b in zip(all_parts(one), all_parts(two), strict=True))
    assert torch.equal(statistics.hessian, hessian)
    others = [solve(weight, spec(), seed=seed, statistics=statistics).output_error for seed in range(4)]
    assert max(others) <= 1.05 * min(others)


@pytest.mark.parametrize("fails", [False, True])
def test_the_statistics_are_what_they_were_whatever_happens(fails, monkeypatch):
    statistics = measured(96)
    kept = statistics.hessian.clone()
    if fails:
        monkeypatch.setattr(IntegerGrid, "round_gptq", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        solve(gauss(48, 96, scale=0.02), spec(), statistics=statistics)
    assert torch.equal(statistics.hessian, kept)


@pytest.mark.parametrize(
    ("start", "rounds", "storage"), [("quantize", 4, None), ("low-rank", 3, None), ("either", 3, torch.bfloat16)]
)
@pytest.mark.parametrize("count", [2, 3])
def test_the_rows_of_a_layer_are_shared(start, rounds, storage, count):
    weight = gauss(2 * LEAST_ROWS + 40, 96)
    seen = measured(96)
    drift = 0.1 * gauss(len(weight), 96, seed=1) @ seen.hessian
    asked = spec(start=start, iterations=rounds, storage=storage)

    def do(processes):
        statistics = replace(seen, hessian=seen.hessian.clone(), drift=drift)
        quantized, approximation, trace = alternate(weight, replace(asked, processes=processes), statistics, seed=0)
        parts = *quantized.tensors, approximation.factors.B, approximation.factors.A
        return parts, trace

    alone = do(ALONE)
    for parts, trace in in_threads(count, do):
        assert trace == alone[1]
        assert all(map(torch.equal, parts, alone[0]))


@pytest.mark.parametrize("drift", [False, True])
def test_beside_h_one_matrix_of_all_inputs_is_in_memory(drift):
    columns, weight = 1024, gauss(16, 1024, scale=0.02)
    statistics = measured(columns, drift=torch.zeros_like(weight) if drift else None)
    peak = most_allocated(lambda: solve(weight, spec(rank=4), statistics=statistics))
    assert 4 * columns**2 < peak < 1.3 * 4 * columns**2
