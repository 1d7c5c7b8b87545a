"""The solver without data: Q and L that are close to W everywhere."""

from __future__ import annotations

import torch

from qinit.grids import Quantized
from qinit.linalg.chunks import row_chunks
from qinit.linalg.low_rank import COLD_STEPS, Approximation, LowRank, full_svd, random_basis, subspace
from qinit.solver.residual import frobenius, residual_norm, residual_of
from qinit.solver.spec import LayerSpec, Solution

CANCELLED = 1e-3  # a difference of squares in float32 that is smaller has lost three digits or more
FINAL_STEPS = 2  # the last fit is what the trainer starts from: converge it


def solve_data_free(weight: torch.Tensor, spec: LayerSpec, seed: int) -> Solution:
    """Minimise the Frobenius norm of W - Q - L.

    Alternates rounding a target X to the grid, Q = round(X), and fitting L to W - Q. Plain alternation
    (LoftQ, arXiv:2310.08659, algorithm 1) has X = W - L; it stalls once few codes change. Over-relaxed,
    X += w (W - L - X) with w = 2 moves to the mirror image of X at the set of reachable targets, and the
    same number of rounds ends at a lower error. The last round is always plain; so are all where quantizing
    goes first: there the larger steps gain nothing and make L larger.
    """
    method, grid = spec.method, spec.grid
    norm = frobenius(weight)
    refit = method.refit and spec.rank > 0
    low_rank_first = spec.rank > 0 and method.low_rank_first(spec.bits, spec.rank, weight.shape)
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
            residual = residual_of(weight, quantized, spec)
        if refit:
            approximation = _fit(residual, spec, approximation, seed)
            whole = frobenius(residual) ** 2
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
    residual = residual_of(weight, quantized, spec)
    if refit and method.svd == "subspace" and approximation is not None:
        approximation = subspace(residual, spec.rank, approximation.basis, FINAL_STEPS)
    factors = approximation.factors if approximation else None
    return Solution(
        quantized,
        factors,
        error=residual_norm(residual, factors) / norm if norm else 0.0,
        quantized_error=frobenius(residual) / norm if norm else 0.0,
        trace=tuple(trace),
    )


def _moved(target: torch.Tensor, weight: torch.Tensor, low_rank: LowRank, relaxation: float) -> torch.Tensor:
    """Return `target` moved by `relaxation` of its way to W - B A; in place unless it is W itself."""
    result = torch.empty_like(weight) if target is weight else target
    for rows in row_chunks(*weight.shape, device=weight.device):
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
