"""The calibrated peers against their papers' algorithms, written again here: float64, numpy, nothing shared."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm as normal

from qinit import peers
from qinit.calibration.statistics import Statistics
from qinit.errors import QinitError
from qinit.lowrank import Weighting, closed_form, full_svd
from qinit.magr import reduce_magnitude
from qinit.methods import METHODS, Method
from qinit.peers import activation_norm, preserved_rank, solve_peer, weighting_of
from qinit.rounding import round_gptq
from qinit.solver import LayerSpec, stored

PEERS = [name for name, row in METHODS.items() if row.metric != "weight" and "arXiv" in row.source]
ROWS, COLUMNS, RANK, GROUP = 48, 192, 8, 64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0, structure: float = 1.0) -> torch.Tensor:
    """Noise and `structure` times a rank-4 part, as large as trained weights are."""
    low_rank = draw(rows, 4, seed=seed + 1) @ draw(4, columns, seed=seed + 2)
    return 0.02 * (draw(rows, columns, seed=seed) + structure * low_rank)


def statistics(columns: int = COLUMNS, rows: int = ROWS, tokens: int = 512, seed: int = 9) -> Statistics:
    """Correlated inputs with a few loud channels; fewer tokens than columns make H singular."""
    mixing = torch.eye(columns) + 0.3 * draw(columns, columns, seed=seed) / columns**0.5
    loud = torch.ones(columns)
    loud[:: max(columns // 5, 1)] = 8.0
    x = (draw(tokens, columns, seed=seed + 1) @ mixing * loud).double()
    fisher = draw(rows, columns, seed=seed + 2).square() * draw(rows, 1, seed=seed + 3).exp() * loud
    return Statistics((x.T @ x / tokens).float(), x.abs().mean(0).float(), tokens, fisher=fisher)


def spec(method: str | Method, bits: int = 2, rank: int = RANK, storage=None) -> LayerSpec:
    row = METHODS[method] if isinstance(method, str) else method
    return LayerSpec(row, bits, GROUP, rank, row.iterations, storage)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def product(solution) -> np.ndarray:
    return array(solution.low_rank.B) @ array(solution.low_rank.A)


def norm_under(matrix: np.ndarray, layer_spec: LayerSpec, seen: Statistics) -> float:
    if layer_spec.method.metric == "fisher":
        return float(np.sqrt((array(seen.fisher) * matrix**2).sum()))
    return float(np.sqrt(max(np.trace(matrix @ array(seen.hessian) @ matrix.T), 0)))


# The papers' algorithms.


def min_max(weight: np.ndarray, bits: int) -> np.ndarray:
    """Asymmetric rounding to nearest, one float16 scale and one zero point per group."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.floor(-low / scale + 0.5)
    scale = scale.astype(np.float32).astype(np.float16).astype(np.float64)
    codes = np.clip(np.floor(groups / scale + 0.5) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


def normal_float(weight: np.ndarray, bits: int) -> np.ndarray:
    positive = normal.ppf(np.linspace(0.9677083, 0.5, 2 ** (bits - 1) + 1)[:-1])
    negative = -normal.ppf(np.linspace(0.9677083, 0.5, 2 ** (bits - 1))[:-1])
    table = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    blocks = weight.reshape(-1, GROUP)
    absmax = np.abs(blocks).max(1, keepdims=True)
    return (table[np.abs(blocks[..., None] / absmax[..., None] - table).argmin(-1)] * absmax).reshape(weight.shape)


def symmetric_root(hessian: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(hessian)
    return vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T


def triplets(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


Answer = tuple[np.ndarray, np.ndarray, np.ndarray]  # Q [out, in], B [out, r], A [r, in]


def lqer(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """L2QER: SVD of diag(s) E', A = diag(s)^-1 U and B = S V' there; both transposed here."""
    s = np.maximum(array(seen.magnitude), 1e-4)
    s /= np.sqrt(s.min() * s.max())
    quantized = min_max(weight, bits)
    U, S, Vh = triplets(np.diag(s) @ (weight - quantized).T, RANK)
    return quantized, (np.diag(S) @ Vh).T, (np.diag(1 / s) @ U).T


def qera(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """QERA-exact: A = R^-1/2 U, B = S V' for the SVD of R^1/2 E'."""
    root = symmetric_root(array(seen.hessian))
    quantized = min_max(weight, bits)
    U, S, Vh = triplets(root @ (weight - quantized).T, RANK)
    return quantized, (np.diag(S) @ Vh).T, np.linalg.solve(root, U).T


def eora(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """EoRA: project E on the eigenvectors, each by the root of its eigenvalue, and share the singular values out."""
    target = torch.from_numpy(weight).float()
    rounded = round_gptq(target, seen.hessian, bits=bits, group_size=GROUP, search="minmax")[0]
    quantized = array(stored(rounded, spec("eora", bits)))
    values, vectors = np.linalg.eigh(array(seen.hessian))
    U, S, Vh = triplets((weight - quantized) @ vectors @ np.diag(np.sqrt(values)), RANK)
    return quantized, U * np.sqrt(S), np.sqrt(S)[:, None] * Vh @ np.diag(values**-0.5) @ vectors.T


def cloq(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """CLoQ, theorem 3.1: A = R^-1 U S and B = V for the SVD of R E', R = diag(sqrt(values)) vectors' of H + ridge."""
    reduced = torch.from_numpy(magr(weight, array(seen.hessian))).float()
    rounded = round_gptq(reduced, seen.hessian, bits=bits, group_size=GROUP, search="minmax")[0]
    quantized = array(stored(rounded, spec("cloq", bits)))
    hessian = array(seen.hessian)
    values, vectors = np.linalg.eigh(hessian + 0.01 * np.trace(hessian) / len(hessian) * np.eye(len(hessian)))
    root = np.diag(np.sqrt(values)) @ vectors.T
    U, S, Vh = triplets(root @ (weight - quantized).T, RANK)
    return quantized, Vh.T, (np.linalg.solve(root, U) * S).T


def magr(weight: np.ndarray, hessian: np.ndarray, strength: float = 1e-4, steps: int = 200) -> np.ndarray:
    """Proximal gradient; the projection on the l1 ball finds its threshold by bisection."""
    hessian = hessian / np.linalg.norm(hessian, 2)
    result = weight
    for _ in range(steps):
        x = (result - (result - weight) @ hessian).reshape(len(weight), -1, GROUP) / strength
        low, high = np.zeros(x.shape[:2]), np.abs(x).max(-1)
        for _ in range(60):
            middle = (low + high) / 2
            outside = np.maximum(np.abs(x) - middle[..., None], 0).sum(-1) > 1
            low, high = np.where(outside, middle, low), np.where(outside, high, middle)
        projected = np.sign(x) * np.maximum(np.abs(x) - high[..., None], 0)
        inside = np.abs(x).sum(-1, keepdims=True) <= 1
        result = (strength * (x - np.where(inside, x, projected))).reshape(weight.shape)
    return result


def srr_rank(weight: np.ndarray, root: np.ndarray, rank: int, seed: int) -> int:
    def left(matrix: np.ndarray, p: int) -> float:
        U, S, Vh = triplets(matrix, p)
        return float(np.linalg.norm(matrix - U @ np.diag(S) @ Vh) ** 2 / np.linalg.norm(matrix) ** 2)

    probe = array(torch.rand(*weight.shape, generator=torch.Generator().manual_seed(seed))) * 2 - 1
    predicted = [left(root @ weight.T, k) * left(root @ probe.T, rank - k) for k in range(rank + 1)]
    return int(np.argmin(predicted))


def srr(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """SRR: SVD_k of S W kept, the rest quantized, S E fitted with what is left of the rank."""
    root = symmetric_root(array(seen.hessian))
    k = srr_rank(weight, root, RANK, seed=0)
    U1, S1, Vh1 = triplets(root @ weight.T, k)
    A1, B1 = np.linalg.solve(root, U1).T, (np.diag(S1) @ Vh1).T
    quantized = min_max(weight - B1 @ A1, bits)
    U2, S2, Vh2 = triplets(root @ (weight - B1 @ A1 - quantized).T, RANK - k)
    A2, B2 = np.linalg.solve(root, U2).T, (np.diag(S2) @ Vh2).T
    return quantized, np.hstack([B1, B2]), np.vstack([A1, A2])


def lq_lora(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """LQ-LoRA: Fisher-weighted SVD with row and column means, then Q, until the weighted error rises."""
    root = np.sqrt(array(seen.fisher))
    row, column = root.mean(1, keepdims=True), root.mean(0, keepdims=True)
    quantized, last = np.zeros_like(weight), np.inf
    for _ in range(100):
        U, S, Vh = triplets(row * (weight - quantized) * column, RANK)
        B, A = U * np.sqrt(S) / row, np.sqrt(S)[:, None] * Vh / column
        quantized = normal_float(weight - B @ A, bits)
        error = np.linalg.norm(root * (weight - quantized - B @ A))
        if error > last:
            break
        last = error
    return quantized, B, A


PAPERS = {"lqer": lqer, "qera": qera, "eora": eora, "cloq": cloq, "srr": srr, "lq-lora": lq_lora}


def test_every_peer_has_its_paper_here():
    assert set(PEERS) == set(PAPERS)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_its_paper_s_algorithm(name, bits):
    weight, seen = weights(), statistics()
    quantized, B, A = PAPERS[name](array(weight), seen, bits)
    solution = solve_peer(weight, spec(name, bits), seen)
    # Float32 turns a value that lies between two levels now and then; LQ-LoRA's rounds feed it back.
    changed = np.abs(array(stored(solution.quantized, spec(name, bits))) - quantized) > 1e-6
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
    solution = solve_peer(weight, layer_spec, seen)
    rest = array(weight) - array(stored(solution.quantized, layer_spec))
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
    aware = solve_peer(weight, dense, seen)
    unaware = solve_peer(weight, replace(dense, storage=None), seen)
    rest = array(weight) - array(stored(unaware.quantized, dense)) - product(unaware)
    assert aware.error < norm_under(rest, dense, seen) / norm_under(array(weight), dense, seen)


@pytest.mark.parametrize("name", PEERS)
def test_zeros_give_zeros(name):
    seen = statistics()
    solution = solve_peer(torch.zeros(ROWS, COLUMNS), spec(name), seen)
    assert not stored(solution.quantized, spec(name)).any()
    assert not product(solution).any()
    assert solution.error == solution.quantized_error == 0.0


@pytest.mark.parametrize("name", PEERS)
def test_inputs_that_were_never_active_harm_nothing(name):
    zeros = torch.zeros
    unseen = Statistics(zeros(COLUMNS, COLUMNS), zeros(COLUMNS), 1, fisher=zeros(ROWS, COLUMNS))
    solution = solve_peer(weights(), spec(name), unseen)
    assert solution.error == 0.0
    assert np.isfinite(product(solution)).all()


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1), (3, 100)])
@pytest.mark.parametrize("name", PEERS)
def test_the_smallest_shapes_work_at_their_full_rank(name, shape):
    weight, seen = weights(*shape), statistics(shape[1], shape[0])
    solution = solve_peer(weight, spec(name, rank=min(shape)), seen)
    assert solution.low_rank.B.shape == (shape[0], min(shape))
    assert solution.error <= 1e-4


@pytest.mark.parametrize("name", PEERS)
def test_the_same_call_gives_the_same_bits_and_leaves_its_arguments_alone(name):
    weight, seen = weights(), statistics()
    kept, hessian, state = weight.clone(), seen.hessian.clone(), torch.get_rng_state()
    one, two = (solve_peer(weight, spec(name), seen, seed=3) for _ in range(2))
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
        solve_peer(weights(), spec("lq-lora"), replace(statistics(), fisher=None))


def test_calibration_that_counts_beats_the_plain_svd_of_the_same_q():
    weight, seen = weights(), statistics()
    solution = solve_peer(weight, spec("qera"), seen)
    residual = weight - stored(solution.quantized, spec("qera"))
    plain = full_svd(residual, RANK).factors
    whole = activation_norm(weight, seen.hessian)
    assert solution.error < activation_norm(residual - plain.B @ plain.A, seen.hessian) / whole
    assert solution.error <= solve_peer(weight, spec("lqer"), seen).error


def test_error_feedback_beats_rounding_to_nearest_under_h():
    weight, seen = weights(), statistics()
    nearest = solve_peer(weight, spec("qera", 3), seen)
    for name in ("eora", "cloq"):
        assert solve_peer(weight, spec(name, 3), seen).quantized_error < nearest.quantized_error


def test_the_metric_weight_is_plain_svd():
    plain = replace(METHODS["qera"], metric="weight", split="balanced")
    weight, seen = weights(), statistics()
    solution = solve_peer(weight, spec(plain), seen)
    residual = weight - stored(solution.quantized, spec(plain))
    expected = full_svd(residual, RANK).factors
    torch.testing.assert_close(torch.from_numpy(product(solution)).float(), expected.B @ expected.A)


# The closed form.


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
            B = factors.B * (1 + size * draw(ROWS, rank, seed=seed))
            A = factors.A * (1 + size * draw(rank, COLUMNS, seed=seed + 50))
            assert float(loss(residual, hessian, B, A)) > least


@pytest.mark.parametrize("tokens", [5, 64])  # 5: H is singular
def test_the_closed_form_is_what_brute_force_finds(tokens):
    E, x = draw(6, 8).double(), draw(tokens, 8, seed=1).double()
    factors = closed_form(E.float(), (x.T @ x / tokens).float(), 2)

    def output_error(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        return ((E - B @ A) @ x.T).square().sum() / tokens

    found = []
    for seed in range(3):
        B = draw(6, 2, seed=seed + 10).double().requires_grad_()
        A = draw(2, 8, seed=seed + 20).double().requires_grad_()
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


def test_the_activation_norm_is_that_of_the_outputs():
    x = draw(300, 32).double()
    E = draw(16, 32, seed=1)
    expected = float((x @ E.double().T).square().sum(1).mean().sqrt())
    assert activation_norm(E, x.T @ x / 300) == pytest.approx(expected, rel=1e-9)


# SRR.


def test_srr_without_anything_preserved_is_qera(monkeypatch):
    weight, seen = weights(), statistics()
    monkeypatch.setattr(peers, "preserved_rank", lambda *_: 0)
    one, two = solve_peer(weight, spec("srr"), seen), solve_peer(weight, spec("qera"), seen)
    assert torch.equal(one.quantized.codes, two.quantized.codes)
    assert torch.equal(one.low_rank.A, two.low_rank.A)
    assert torch.equal(one.low_rank.B, two.low_rank.B)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("structure", [1.0, 4.0])
def test_srr_is_not_behind_qera_on_weights_with_structure(structure, bits):
    errors = {"srr": 0.0, "qera": 0.0}
    for seed in range(3):
        for name in errors:
            errors[name] += solve_peer(weights(seed=seed, structure=structure), spec(name, bits), statistics()).error
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
        solution = solve_peer(weights(seed=seed), spec("lq-lora"), statistics())
        trace = solution.trace
        assert 2 <= len(trace) < METHODS["lq-lora"].iterations
        assert all(later < earlier for earlier, later in pairwise(trace[:-1]))
        assert trace[-1] >= trace[-2]
        assert solution.error == pytest.approx(trace[-1], rel=1e-6)  # as the released code: the round after


def test_lq_lora_with_keep_best_returns_the_round_before():
    weight, seen = weights(), statistics()
    best = solve_peer(weight, spec(replace(METHODS["lq-lora"], keep_best=True)), seen)
    assert best.error == pytest.approx(min(best.trace), rel=1e-6)
    assert best.error <= solve_peer(weight, spec("lq-lora"), seen).error


# MagR.


def test_magr_shrinks_the_largest_weights_and_hardly_the_outputs():
    weight, seen = weights(structure=0.0), statistics(tokens=64)  # two thirds of the directions are free
    reduced = reduce_magnitude(weight, seen.hessian, GROUP)
    before, after = (w.reshape(ROWS, -1, GROUP).abs().amax(-1) for w in (weight, reduced))
    assert (after <= before + 1e-6).all()
    assert float(after.mean()) <= 0.85 * float(before.mean())
    lost = activation_norm(reduced - weight, seen.hessian) / activation_norm(weight, seen.hessian)
    assert lost <= 0.02
    assert (reduced - weight).norm() > 5 * lost * weight.norm()


@pytest.mark.parametrize("shape", [(5, 128), (5, 100), (1, 1)])
def test_magr_lowers_its_objective_step_by_step(shape):
    weight, hessian = weights(*shape), statistics(shape[1], tokens=64).hessian
    scaled = hessian / torch.linalg.matrix_norm(hessian, 2)

    def objective(reduced: torch.Tensor) -> float:
        padded = torch.nn.functional.pad(reduced, (0, -shape[1] % GROUP)).reshape(shape[0], -1, GROUP)
        return activation_norm(reduced - weight, scaled) ** 2 / 2 + 1e-4 * float(padded.abs().amax(-1).sum())

    values = [objective(reduce_magnitude(weight, hessian, GROUP, steps=steps)) for steps in (0, 1, 10, 50, 200)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(values))
    assert values[-1] < values[0]


def test_magr_leaves_weights_alone_that_no_input_reaches():
    weight = weights()
    assert torch.equal(reduce_magnitude(weight, torch.zeros(COLUMNS, COLUMNS), GROUP), weight)
