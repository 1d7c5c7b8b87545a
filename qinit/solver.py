"""The solver: one weight matrix in, quantized matrix and low-rank factors out. Pure and deterministic."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from qinit.calibrated import alternate
from qinit.calibration.statistics import Statistics
from qinit.grids import GRIDS, Quantized
from qinit.linalg.chunks import row_chunks
from qinit.linalg.hessian import output_norm
from qinit.linalg.low_rank import COLD_STEPS, Approximation, LowRank, full_svd, random_basis, subspace
from qinit.methods import Method

CANCELLED = 1e-3  # a difference of squares in float32 that is smaller has lost three digits or more
OUTPUT_ROWS = 256  # enough to know an output error to a few percent, and nearly free
FINAL_STEPS = 2  # the last fit is what the trainer starts from: converge it


@dataclass(frozen=True)
class LayerSpec:
    """What to do with one matrix. `storage` is the dtype that Q will be rounded to when it is stored
    unpacked (None: stored as codes, nothing is lost)."""

    method: Method
    bits: int
    group_size: int
    rank: int
    iterations: int
    storage: torch.dtype | None = None


@dataclass(frozen=True)
class Solution:
    """W ~ Q + L: Q [out, in] as codes, L = B A unscaled. Errors are Frobenius norms relative to W's;
    `trace` has one per iteration, `quantized_error` is that of Q alone. With calibration, output errors are the root
    mean squares of (W - Q - L) x and (W - Q) x relative to W x, and `trace` is in the method's own metric."""

    quantized: Quantized
    low_rank: LowRank | None
    error: float
    quantized_error: float
    trace: tuple[float, ...]
    output_error: float | None = None
    quantized_output_error: float | None = None


def seed_of(name: str, seed: int) -> int:
    """A layer's own seed, from its name: the order of the jobs does not change any byte."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def solve(weight: torch.Tensor, spec: LayerSpec, seed: int = 0, statistics: Statistics | None = None) -> Solution:
    """Split `weight` [out, in] (float32) into a quantized and a rank-r part, as the method's row says.

    `statistics` are needed by every row whose metric is not `weight`. The rank must not exceed min(out, in).
    """
    if spec.method.metric == "weight":
        return _solve_for_weight(weight, spec, seed)
    if statistics is None:
        raise ValueError(f"method {spec.method.name} needs statistics of the layer's inputs")
    if spec.method.iterations_fixed:
        from qinit.peers import solve_peer

        found = solve_peer(weight, spec, statistics, seed)
        assert found.low_rank is not None
        return _measured(weight, spec, found.quantized, found.low_rank, statistics, found.trace)
    quantized, approximation, trace = alternate(weight, spec, statistics, seed)
    return _measured(weight, spec, quantized, approximation.factors, statistics, trace)


def _measured(
    weight: torch.Tensor,
    spec: LayerSpec,
    quantized: Quantized,
    factors: LowRank,
    statistics: Statistics,
    trace: tuple[float, ...],
) -> Solution:
    """Measure a solution: exactly in the weights' norm, at the output on OUTPUT_ROWS rows spread over the layer."""
    residual = _stored_residual(weight, quantized, spec)
    rows = slice(0, None, max(1, len(weight) // OUTPUT_ROWS))
    left = torch.addmm(residual[rows], factors.B[rows], factors.A, alpha=-1)
    norm, output = _norm(weight), output_norm(weight[rows], statistics.hessian)
    return Solution(
        quantized,
        factors,
        error=residual_norm(residual, factors) / norm if norm else 0.0,
        quantized_error=_norm(residual) / norm if norm else 0.0,
        trace=trace,
        output_error=output_norm(left, statistics.hessian) / output if output else 0.0,
        quantized_output_error=output_norm(residual[rows], statistics.hessian) / output if output else 0.0,
    )


def _solve_for_weight(weight: torch.Tensor, spec: LayerSpec, seed: int) -> Solution:
    """Minimise the Frobenius norm of W - Q - L.

    Alternates rounding a target X to the grid, Q = round(X), and fitting L to W - Q. Plain alternation
    (LoftQ, arXiv:2310.08659, algorithm 1) has X = W - L; it stalls once few codes change. Over-relaxed,
    X += w (W - L - X) with w = 2 moves to the mirror image of X at the set of reachable targets, and the
    same number of rounds ends at a lower error. The last round is always plain; so are all where quantizing
    goes first: there the larger steps gain nothing and make L larger.
    """
    method, grid = spec.method, GRIDS[spec.method.grid]
    norm = _norm(weight)
    low_rank_first = method.low_rank_first(spec.bits, spec.rank, weight.shape)
    approximation = _fit(weight, spec, None, seed) if low_rank_first else None
    target = weight
    best: tuple[float, Quantized, Approximation | None] | None = None
    quantized: Quantized | None = None
    trace = []
    for round_number in range(spec.iterations):
        if approximation is not None:
            plain = round_number in (0, spec.iterations - 1) or not low_rank_first
            target = _moved(target, weight, approximation.factors, 1.0 if plain else method.relaxation)
        residual = torch.empty(0)  # frees the last one before the next is made
        quantized, residual = grid.quantize(
            target,
            weight,
            bits=spec.bits,
            group_size=spec.group_size,
            search=method.search,
            previous=quantized,
        )
        if spec.storage not in (None, torch.float32):
            del residual
            residual = _stored_residual(weight, quantized, spec)
        if method.refit:
            approximation = _fit(residual, spec, approximation, seed)
            whole = _norm(residual) ** 2
            rest = whole - approximation.captured
            lost = rest < CANCELLED * whole  # to rounding: measure what is left instead
            error = residual_norm(residual, approximation.factors) if lost else rest**0.5
        else:
            error = residual_norm(residual, approximation.factors if approximation else None)
        trace.append(error / norm if norm else 0.0)
        if best is None or not method.keep_best or error < best[0]:
            best = (error, quantized, approximation)
    assert best is not None
    _, quantized, approximation = best
    del target, residual
    residual = _stored_residual(weight, quantized, spec)
    if method.refit and method.svd == "subspace" and approximation is not None:
        approximation = subspace(residual, spec.rank, approximation.basis, FINAL_STEPS)
    factors = approximation.factors if approximation else None
    return Solution(
        quantized,
        factors,
        error=residual_norm(residual, factors) / norm if norm else 0.0,
        quantized_error=_norm(residual) / norm if norm else 0.0,
        trace=tuple(trace),
    )


def _moved(target: torch.Tensor, weight: torch.Tensor, low_rank: LowRank, relaxation: float) -> torch.Tensor:
    """Return `target` moved by `relaxation` of its way to W - B A; in place unless it is W itself."""
    result = torch.empty_like(weight) if target is weight else target
    for rows in row_chunks(*weight.shape):
        part = weight[rows]
        if relaxation != 1.0:
            part = torch.lerp(target[rows], part, relaxation)
        torch.addmm(part, low_rank.B[rows], low_rank.A, alpha=-relaxation, out=result[rows])
    return result


def _fit(matrix: torch.Tensor, spec: LayerSpec, previous: Approximation | None, seed: int) -> Approximation:
    if spec.method.svd == "full":
        return full_svd(matrix, spec.rank)
    if previous is not None:
        return subspace(matrix, spec.rank, previous.basis)
    basis = random_basis(matrix.shape[1], spec.rank, seed, matrix.device)
    return subspace(matrix, spec.rank, basis, COLD_STEPS)


def stored(quantized: Quantized, spec: LayerSpec) -> torch.Tensor:
    """Q in float32 exactly as a loader will see it."""
    values = GRIDS[spec.method.grid].dequantize(quantized)
    return values if spec.storage is None else values.copy_(values.to(spec.storage))


def _stored_residual(weight: torch.Tensor, quantized: Quantized, spec: LayerSpec) -> torch.Tensor:
    return stored(quantized, spec).neg_().add_(weight)


def residual_norm(residual: torch.Tensor, low_rank: LowRank | None) -> float:
    """Return the Frobenius norm of `residual - B A`, never holding that matrix whole."""
    if low_rank is None:
        return _norm(residual)
    parts = [
        torch.linalg.vector_norm(torch.addmm(residual[rows], low_rank.B[rows], low_rank.A, alpha=-1), dim=1)
        for rows in row_chunks(*residual.shape)
    ]
    return float(torch.cat(parts).double().norm())


def _norm(matrix: torch.Tensor) -> float:
    """Frobenius norm: float32 along a row, float64 over the rows, one pass and no copy."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().norm())
