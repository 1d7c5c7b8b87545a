"""The calibrated peers against their papers' algorithms, written again here: float64, numpy, nothing shared."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from qinit.errors import QinitError
from qinit.linalg.hessian import activation_norm
from qinit.linalg.low_rank import full_svd
from qinit.linalg.weighting import Weighting
from qinit.solver import published as peers
from qinit.solver.methods import METHODS
from qinit.solver.published import preserved_rank, solve_published, weighting_of
from qinit.solver.residual import as_loaded
from qinit.solver.statistics import Statistics
from tests.layers import COLUMNS, RANK, ROWS, array, statistics, weights
from tests.qinit.solver.papers import PAPERS, norm_under, product, spec

PEERS = [name for name, row in METHODS.items() if row.needs and "arXiv" in row.source]


def test_every_peer_has_its_paper_here():
    assert set(PEERS) == set(PAPERS)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_its_paper_s_algorithm(name, bits):
    weight, seen = weights(), statistics()
    if METHODS[name].magr:  # clips a group at plus and minus the same: its zero point would lie between two codes
        weight = weight + weight.std()
    quantized, B, A = PAPERS[name](array(weight), seen, bits)
    solution = solve_published(weight, spec(name, bits), seen)
    # Float32 turns a value that lies between two levels now and then; LQ-LoRA's rounds feed it back.
    changed = np.abs(array(as_loaded(solution.quantized, spec(name, bits))) - quantized) > 1e-6
    assert changed.mean() <= (0.01 if name == "lq-lora" else 1e-3)
    whole = norm_under(array(weight), spec(name), seen)
    expected = norm_under(array(weight) - quantized - B @ A, spec(name), seen) / whole
    assert solution.error == pytest.approx(expected, rel=2e-3)
    assert np.linalg.norm(product(solution) - B @ A) <= 0.05 * np.linalg.norm(B @ A)
    for ours, theirs in ((solution.low_rank.B, B), (solution.low_rank.A.T, A.T)):  # the split, up to signs
        sizes = np.linalg.norm(theirs, axis=0)
        np.testing.assert_allclose(np.linalg.norm(array(ours), axis=0), sizes, rtol=0.05)


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
@pytest.mark.parametrize("tokens", [40, 512])
@pytest.mark.parametrize("name", PEERS)
def test_the_reported_errors_are_those_of_what_is_returned(name, tokens, storage):
    weight, seen, layer_spec = weights(), statistics(tokens=tokens), spec(name, 4, storage=storage)
    solution = solve_published(weight, layer_spec, seen)
    rest = array(weight) - array(as_loaded(solution.quantized, layer_spec))
    whole = norm_under(array(weight), layer_spec, seen)
    assert solution.quantized_error == pytest.approx(norm_under(rest, layer_spec, seen) / whole, rel=1e-4)
    error = norm_under(rest - product(solution), layer_spec, seen) / whole
    assert solution.error == pytest.approx(error, rel=1e-4)
    assert solution.trace[-1] == pytest.approx(solution.error, rel=1e-4)
    assert solution.error < solution.quantized_error
    assert solution.low_rank.B.dtype == solution.low_rank.A.dtype == torch.float32
    assert torch.isfinite(solution.low_rank.A).all()


@pytest.mark.parametrize("name", [name for name in PEERS if METHODS[name].start == "quantize"])
def test_the_fit_is_to_what_storage_makes_of_q(name):
    weight, seen = weights(), statistics()
    dense = spec(name, 8, rank=32, storage=torch.bfloat16)
    aware = solve_published(weight, dense, seen)
    unaware = solve_published(weight, replace(dense, storage=None), seen)
    rest = array(weight) - array(as_loaded(unaware.quantized, dense)) - product(unaware)
    assert aware.error < norm_under(rest, dense, seen) / norm_under(array(weight), dense, seen)


@pytest.mark.parametrize("name", PEERS)
def test_zeros_give_zeros(name):
    seen = statistics()
    solution = solve_published(torch.zeros(ROWS, COLUMNS), spec(name), seen)
    assert not as_loaded(solution.quantized, spec(name)).any()
    assert not product(solution).any()
    assert solution.error == solution.quantized_error == 0.0


@pytest.mark.parametrize("name", PEERS)
def test_inputs_that_were_never_active_harm_nothing(name):
    zeros = torch.zeros
    unseen = Statistics(zeros(COLUMNS, COLUMNS), zeros(COLUMNS), 1, fisher=zeros(ROWS, COLUMNS))
    solution = solve_published(weights(), spec(name), unseen)
    assert solution.error == 0.0
    assert np.isfinite(product(solution)).all()


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1), (3, 100)])
@pytest.mark.parametrize("name", PEERS)
def test_the_smallest_shapes_work_at_their_full_rank(name, shape):
    weight, seen = weights(*shape), statistics(shape[1], shape[0])
    solution = solve_published(weight, spec(name, rank=min(shape)), seen)
    assert solution.low_rank.B.shape == (shape[0], min(shape))
    assert solution.error <= 1e-4


@pytest.mark.parametrize("name", PEERS)
def test_the_same_call_gives_the_same_bits_and_leaves_its_arguments_alone(name):
    weight, seen = weights(), statistics()
    kept, hessian, state = weight.clone(), seen.hessian.clone(), torch.get_rng_state()
    one, two = (solve_published(weight, spec(name), seen, seed=3) for _ in range(2))
    assert torch.equal(one.quantized.codes, two.quantized.codes)
    assert torch.equal(one.low_rank.A, two.low_rank.A)
    assert torch.equal(weight, kept)
    assert torch.equal(seen.hessian, hessian)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_float64_hessian_is_not_changed_by_the_ridge():
    seen = statistics()
    exact = replace(seen, hessian=seen.hessian.double())
    weighting_of(spec("cloq"), exact)
    assert torch.equal(exact.hessian, seen.hessian.double())


def test_without_fisher_information_the_method_says_so():
    with pytest.raises(QinitError, match="Fisher"):
        solve_published(weights(), spec("lq-lora"), replace(statistics(), fisher=None))


def test_calibration_that_counts_beats_the_plain_svd_of_the_same_q():
    weight, seen = weights(), statistics()
    solution = solve_published(weight, spec("qera"), seen)
    residual = weight - as_loaded(solution.quantized, spec("qera"))
    plain = full_svd(residual, RANK).factors
    whole = activation_norm(weight, seen.hessian)
    assert solution.error < activation_norm(residual - plain.B @ plain.A, seen.hessian) / whole
    assert solution.error <= solve_published(weight, spec("lqer"), seen).error


def test_error_feedback_beats_rounding_to_nearest_under_h():
    weight, seen = weights(), statistics()
    nearest = solve_published(weight, spec("qera", 3), seen)
    for name in ("eora", "cloq"):
        assert solve_published(weight, spec(name, 3), seen).quantized_error < nearest.quantized_error


def test_the_metric_weight_is_plain_svd():
    plain = replace(METHODS["qera"], metric="weight", split="balanced")
    weight, seen = weights(), statistics()
    solution = solve_published(weight, spec(plain), seen)
    residual = weight - as_loaded(solution.quantized, spec(plain))
    expected = full_svd(residual, RANK).factors
    torch.testing.assert_close(torch.from_numpy(product(solution)).float(), expected.B @ expected.A)


# SRR.


def test_srr_without_anything_preserved_is_qera(monkeypatch):
    weight, seen = weights(), statistics()
    monkeypatch.setattr(peers, "preserved_rank", lambda *_: 0)
    one, two = solve_published(weight, spec("srr"), seen), solve_published(weight, spec("qera"), seen)
    assert torch.equal(one.quantized.codes, two.quantized.codes)
    assert torch.equal(one.low_rank.A, two.low_rank.A)
    assert torch.equal(one.low_rank.B, two.low_rank.B)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("structure", [1.0, 4.0])
def test_srr_is_not_behind_qera_on_weights_with_structure(structure, bits):
    errors = {"srr": 0.0, "qera": 0.0}
    for seed in range(3):
        for name in errors:
            errors[name] += solve_published(
                weights(seed=seed, structure=structure), spec(name, bits), statistics()
            ).error
    assert errors["srr"] <= errors["qera"]
    if structure == 4.0:
        assert errors["srr"] <= 0.7 * errors["qera"]


def test_srr_preserves_what_stands_out_and_nothing_of_noise():
    flat = Weighting.of_inputs(torch.eye(COLUMNS))
    assert preserved_rank(weights(structure=0.0), flat, RANK, seed=0) <= RANK
    for seed in range(3):
        assert preserved_rank(weights(structure=4.0), flat, RANK, seed) >= 4
    probe = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ranks = [preserved_rank(weight, flat, RANK, 0) for weight in (probe, weights(structure=4.0))]
    assert ranks[0] < ranks[1]
    assert preserved_rank(torch.zeros(ROWS, COLUMNS), flat, RANK, 0) == 0


# LQ-LoRA.


def test_lq_lora_stops_when_the_error_rises():
    for seed in range(3):
        solution = solve_published(weights(seed=seed), spec("lq-lora"), statistics())
        trace = solution.trace
        assert 2 <= len(trace) < METHODS["lq-lora"].iterations
        assert all(later < earlier for earlier, later in pairwise(trace[:-1]))
        assert trace[-1] >= trace[-2]
        assert solution.error == pytest.approx(trace[-1], rel=1e-6)  # as the released code: the round after


def test_lq_lora_with_keep_best_returns_the_round_before():
    weight, seen = weights(), statistics()
    best = solve_published(weight, spec(replace(METHODS["lq-lora"], keep_best=True)), seen)
    assert best.error == pytest.approx(min(best.trace), rel=1e-6)
    assert best.error <= solve_published(weight, spec("lq-lora"), seen).error
