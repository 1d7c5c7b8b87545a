"""The best rank-r approximation of a matrix, by warm-started subspace iteration or by full SVD, plain or weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

OVERSAMPLE = 8  # extra directions: the r wanted ones converge at the rate of the (r + 8)-th singular value
COLD_STEPS = 4

Split = Literal["balanced", "A", "B"]  # which factor carries the singular values; balanced: their roots in each


@dataclass(frozen=True)
class LowRank:
    """L = B A with B [out, r] and A [r, in], float32."""

    B: torch.Tensor
    A: torch.Tensor

    @classmethod
    def none(cls, rows: int, columns: int) -> LowRank:
        """Return an L of rank 0 for matrices [rows, columns]."""
        return cls(torch.zeros(rows, 0), torch.zeros(0, columns))

    def to(self, device: torch.device) -> LowRank:
        """Return it on a device."""
        return LowRank(self.B.to(device), self.A.to(device))


@dataclass(frozen=True)
class Approximation:
    """Rank-r approximation B A, balanced: with U S V' the r leading triplets, B = U sqrt(S), A = sqrt(S) V'.

    `basis` [in, r + oversampling] starts the next search; `captured` is the sum of the r squared singular values.
    """

    factors: LowRank
    basis: torch.Tensor
    captured: float


def random_basis(columns: int, rank: int, seed: int, device: torch.device) -> torch.Tensor:
    """A start for the first search, drawn on the CPU so that every device starts alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, min(rank + OVERSAMPLE, columns), generator=generator).to(device)


def subspace(matrix: torch.Tensor, rank: int, basis: torch.Tensor, steps: int = 1) -> Approximation:
    """Approximate `matrix` [out, in] at `rank` by `steps` rounds of subspace iteration from `basis` [in, p].

    Block power iteration with a Rayleigh-Ritz step (Halko, Martinsson, Tropp 2011, algorithm 4.4 and
    section 5.1). One step from the basis of a nearby matrix is enough; from a random one use COLD_STEPS.
    """
    range_basis, right, (U, S, Vh) = _iterated(matrix, basis, steps)
    return _balanced(range_basis @ U, S, Vh @ right.T, rank, basis=right @ Vh.T)


def leading(
    matrix: torch.Tensor, count: int, basis: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the `count` leading singular triplets U [out, count], S, V' [count, in], as `subspace` finds them."""
    range_basis, right, (U, S, Vh) = _iterated(matrix, basis, steps)
    return range_basis @ U[:, :count], S[:count], Vh[:count] @ right.T


def _iterated(matrix: torch.Tensor, basis: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    for step in range(steps):
        range_basis = torch.linalg.qr(_times(matrix, basis)).Q
        basis = _times(matrix.T, range_basis)
        if step + 1 < steps:
            basis = torch.linalg.qr(basis).Q
    right, small = torch.linalg.qr(basis)  # basis = right small, so U'M = small' right'
    return range_basis, right, torch.linalg.svd(small.T, full_matrices=False)


def _times(matrix: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return M X for an X of few columns, which lie side by side: so a BLAS is up to a third faster."""
    return (basis.T @ matrix.T).T


@dataclass(frozen=True)
class OutputMetric:
    """G = R' R + diag(d) [out, out], positive definite: what an error at a layer's output costs. `leading` R [k, out],
    `rest` d [out], float32."""

    leading: torch.Tensor
    rest: torch.Tensor

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return G M for M [out, p]."""
        return torch.addmm(self.rest[:, None] * matrix, self.leading.T, self.leading @ matrix)


def output_subspace(
    residual: torch.Tensor,
    hessian: torch.Tensor,
    rank: int,
    basis: torch.Tensor,
    steps: int = 1,
    metric: OutputMetric | None = None,
) -> Approximation:
    """The rank-r L that is best under tr(G (E - L) H (E - L)') for `residual` E [out, in], `hessian` H [in, in] and
    `metric` G [out, out] (None: the identity).

    L = U U' G E with U the r leading eigenvectors of E H E' G, U' G U = I, so no root, eigendecomposition or inverse
    of either is needed; the same optimum as G^-1/2 SVD_r(G^1/2 E H^1/2) H^-1/2 (for G = I QERA's closed form,
    arXiv:2410.06040, theorem 2), singular H included. U is found by `steps` rounds of subspace iteration from `basis`
    [in, p] and a Rayleigh-Ritz step. In the result, `basis` [in, p] starts the next search: after codes were chosen
    with the rows of A in view, what is left lies along them. `captured` is the sum of the r eigenvalues: what L takes
    away from tr(G E H E').
    """
    for _ in range(steps):
        outputs = torch.linalg.qr(_times(residual, _times(hessian, basis))).Q
        if metric is not None:
            inner = torch.linalg.cholesky(symmetric(outputs.T @ metric.times(outputs)))
            outputs = torch.linalg.solve_triangular(inner, outputs.T, upper=False).T
        basis = _times(residual.T, outputs if metric is None else metric.times(outputs))
    values, vectors = torch.linalg.eigh(symmetric(basis.T @ _times(hessian, basis)))
    vectors = vectors.flip(1)
    left, small = torch.linalg.qr(outputs @ vectors[:, :rank])  # their columns are not orthogonal but under G
    rows, S, Vh = torch.linalg.svd(small @ (basis @ vectors[:, :rank]).T, full_matrices=False)
    captured = float(values.flip(0)[:rank].clamp(min=0).double().sum())
    # Equal norms, A with orthogonal rows of one length, so that a step of training moves all r directions alike: on two
    # models it ended 0.3 to 0.9 % lower than from B = U sqrt(S), A = sqrt(S) V', where the leading ones run ahead.
    size = float(S.double().square().mean()) ** 0.25 or 1.0
    factors = LowRank(B=left @ (rows * (S / size)), A=size * Vh)
    return Approximation(factors, basis @ vectors, captured)


def symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix + matrix.T) / 2


def full_svd(matrix: torch.Tensor, rank: int) -> Approximation:
    """The exact truncated SVD (Eckart-Young): what the published methods use, and the tests' reference."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return _balanced(U, S, Vh, rank, basis=Vh[: rank + OVERSAMPLE].T)


def truncated(factors: LowRank, rank: int) -> LowRank:
    """Return the same of a product B A (Eckart-Young), balanced, from its factors alone: the product [out, in] is never
    made. Directions beyond min(out, in) are zero."""
    left, upper = torch.linalg.qr(factors.B)
    right, lower = torch.linalg.qr(factors.A.T)
    small = full_svd(upper @ lower.T, rank).factors
    missing = rank - len(small.A)
    A, B = functional.pad(small.A, (0, 0, 0, missing)), functional.pad(small.B, (0, missing))
    return LowRank(B=left @ B, A=A @ right.T)


def _balanced(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, rank: int, basis: torch.Tensor) -> Approximation:
    root = S[:rank].sqrt()
    factors = LowRank(B=U[:, :rank] * root, A=root[:, None] * Vh[:rank])
    return Approximation(factors, basis, captured=float(S[:rank].double().square().sum()))
