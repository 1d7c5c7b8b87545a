"""Weighted norms of a matrix, and the best low rank in them by its closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinit.linalg.low_rank import LowRank, Split


@dataclass(frozen=True)
class Weighting:
    """The norm ||diag(rows) E root||_F of a matrix E [out, in], all of it in float64.

    `root` [in, k] with its pseudo-inverse `inverse` [k, in]; or both [in], the diagonal of a diagonal root.
    `rows` [out] and `rows_inverse`, None for ones.
    """

    root: torch.Tensor
    inverse: torch.Tensor
    rows: torch.Tensor | None = None
    rows_inverse: torch.Tensor | None = None

    @classmethod
    def of_inputs(cls, hessian: torch.Tensor) -> Weighting:
        """Weigh by `hessian` H [in, in], symmetric and positive semi-definite: ||E root||^2 = tr(E H E').

        root = V sqrt(L) of H = V L V', columns of H's range only: eigenvalues below the rounding of H's own dtype,
        relative to the largest, are taken for zero. Any other root, the symmetric H^1/2 too, gives the same B A.
        """
        values, vectors = torch.linalg.eigh(hessian.double())
        rounding = max(torch.finfo(hessian.dtype).eps, len(values) * torch.finfo(values.dtype).eps)
        kept = values > rounding * values[-1].clamp(min=0)
        scales, vectors = values[kept].sqrt(), vectors[:, kept]
        return cls(root=vectors * scales, inverse=vectors.T / scales[:, None])

    @classmethod
    def diagonal(cls, columns: torch.Tensor, rows: torch.Tensor | None = None) -> Weighting:
        """Weigh column j by `columns` [in] and row i by `rows` [out], none negative; zeros are never divided by."""
        root, rows = columns.double(), None if rows is None else rows.double()
        return cls(root, _reciprocal(root), rows, None if rows is None else _reciprocal(rows))

    def scale(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return diag(rows) E root, float64 [out, k]."""
        scaled = matrix.double() if self.rows is None else matrix.double() * self.rows[:, None]
        return scaled * self.root if self.root.ndim == 1 else scaled @ self.root

    def fit(self, matrix: torch.Tensor, rank: int, split: Split = "balanced") -> LowRank:
        """Return the B A of `rank` next to `matrix` [out, in] in this norm (Eckart-Young on the scaled matrix).

        With U S V' the leading triplets of diag(rows) E root: B = U and A = V' with S where `split` says, and the
        scaling then taken back on either side. What lies outside the range of root stays out of A. Rows of A and
        columns of B beyond min(out, k) are zero.
        """
        U, S, Vh = torch.linalg.svd(self.scale(matrix), full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        on_left = {"balanced": S.sqrt(), "A": torch.ones_like(S), "B": S}[split]
        on_right = {"balanced": S.sqrt(), "A": S, "B": torch.ones_like(S)}[split]
        left, right = U * on_left, on_right[:, None] * Vh
        if self.rows_inverse is not None:
            left = left * self.rows_inverse[:, None]
        right = right * self.inverse if self.inverse.ndim == 1 else right @ self.inverse
        B = torch.zeros(matrix.shape[0], rank, device=matrix.device)
        A = torch.zeros(rank, matrix.shape[1], device=matrix.device)
        B[:, : len(S)], A[: len(S)] = left, right
        return LowRank(B, A)


def closed_form(residual: torch.Tensor, hessian: torch.Tensor, rank: int, split: Split = "balanced") -> LowRank:
    """Return the B A of `rank` that minimises tr((E - B A) H (E - B A)'), for E = `residual` [out, in] (float32) and
    the second moment H = E[x x'] = `hessian` [in, in] of the layer's inputs: SVD_r(E H^1/2) H^-1/2.

    QERA-exact (arXiv:2410.06040, theorem 1), also CLoQ's (arXiv:2501.18475, theorem 3.1) and EoRA's
    (arXiv:2410.21271). Computed in float64, returned in float32. A singular H is inverted on its range.
    """
    return Weighting.of_inputs(hessian).fit(residual, rank, split)


def _reciprocal(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0.0)
