"""The solver: one weight matrix in, quantized matrix and low-rank factors out. Pure and deterministic."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from qinit.grids import GRIDS, LowRank, Quantized
from qinit.grids.base import row_chunks
from qinit.lowrank import COLD_STEPS, Approximation, full_svd, random_basis, subspace
from qinit.methods import Method

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
    `trace` has one per iteration, `quantized_error` is that of Q alone."""

    quantized: Quantized
    low_rank: LowRank | None
    error: float
    quantized_error: float
    trace: tuple[float, ...]


def seed_of(name: str, seed: int) -> int:
    """A layer's own seed, from its name: the order of the jobs does not change any byte."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def solve(weight: torch.Tensor, spec: LayerSpec, seed: int = 0) -> Solution:
    """Split `weight` [out, in] (float32) into a quantized and a rank-r part.

    Alternates rounding W - L to the grid and fitting L to W - Q (LoftQ, arXiv:2310.08659, algorithm 1),
    from the row's start and with its scale search. The rank must not exceed min(out, in).
    """
    method, grid = spec.method, GRIDS[spec.method.grid]
    norm = _norm(weight)
    approximation = _start(weight, spec, seed)
    best: tuple[float, Quantized, Approximation | None] | None = None
    quantized: Quantized | None = None
    trace = []
    for _ in range(spec.iterations):
        quantized, residual = grid.quantize(
            weight,
            approximation.factors if approximation else None,
            bits=spec.bits,
            group_size=spec.group_size,
            search=method.search,
            previous=quantized,
        )
        if spec.storage not in (None, torch.float32):
            residual = _stored_residual(weight, quantized, spec)
        if method.refit:
            approximation = _fit(residual, spec, approximation, seed)
            error = max(_norm(residual) ** 2 - approximation.captured, 0.0) ** 0.5
        else:
            error = residual_norm(residual, approximation.factors if approximation else None)
        trace.append(error / norm if norm else 0.0)
        if best is None or not method.keep_best or error < best[0]:
            best = (error, quantized, approximation)
    assert best is not None
    _, quantized, approximation = best
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


def _start(weight: torch.Tensor, spec: LayerSpec, seed: int) -> Approximation | None:
    return _fit(weight, spec, None, seed) if spec.method.start == "low-rank" else None


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
    return values if spec.storage is None else values.to(spec.storage).float()


def _stored_residual(weight: torch.Tensor, quantized: Quantized, spec: LayerSpec) -> torch.Tensor:
    return stored(quantized, spec).neg_().add_(weight)


def residual_norm(residual: torch.Tensor, low_rank: LowRank | None) -> float:
    """Return the Frobenius norm of `residual - B A`, never holding that matrix whole."""
    if low_rank is None:
        return _norm(residual)
    total = 0.0
    for rows in row_chunks(*residual.shape):
        total += _norm(torch.addmm(residual[rows], low_rank.B[rows], low_rank.A, alpha=-1)) ** 2
    return total**0.5


def _norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
