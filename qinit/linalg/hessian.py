"""What H = E[x x'], the second moment of a layer's inputs, makes of matrices: norms, factors, corrections."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qinit.errors import QinitError
from qinit.linalg.chunks import row_chunks
from qinit.linalg.low_rank import symmetric

WORST_DAMPING = 10.0
NARROWEST = 256  # columns of a symmetric matrix that are computed at once, at least
MOST_CHUNKS = 8  # into which they are cut


def corrected(weight: torch.Tensor, drift: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return T = W + D (C C')^-1, D = E[d x'] [out, in] the `drift` at the layer's output, C [in, in] the Cholesky
    `factor` of the H that is rounded under: the least-squares weight that also makes good what the layers in front
    have left of their own error (as GPTAQ's asymmetric calibration, arXiv:2504.02692, equation 6, here for the
    residual stream too), in so far as that H vouches for it."""
    half = torch.linalg.solve_triangular(factor.T, drift, upper=True, left=False)
    # The solver returns columns side by side; the kernels take rows.
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False).contiguous().add_(weight)


def output_norm(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return sqrt(tr(M H M')): the root mean square of the output that M [out, in] makes of the layer's inputs."""
    return max(float(((matrix @ hessian) * matrix).sum(dtype=torch.float64)), 0.0) ** 0.5


def without(hessian: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Return H - H A' (A H A')^-1 A H: the part of H that no choice of B in B A can make good.

    min over B of tr((E - B A) H (E - B A)') is tr(E P E') with this P (as in ProjQ), so codes that are rounded
    under P leave to the adapter what it can repair. A [r, in] may have dependent rows.
    """
    image = hessian @ A.T
    inner = symmetric((A @ image).double())
    inner.diagonal().add_(1e-6 * float(inner.diagonal().mean()) + 1e-30)
    return torch.addmm(hessian, image, torch.linalg.solve(inner, image.T.double()).float(), alpha=-1)


def add_second_moment(moment: torch.Tensor, x: torch.Tensor, old: float, new: float) -> None:
    """Set M [n, n] to `old` M + `new` x' x in place for tokens x [tokens, n]: in blocks of columns, on and below the
    diagonal only, which saves nearly half of the work. `mirror` fills in the rest."""
    for chunk, _ in _halves(len(moment)):
        start = slice(chunk.start, None)
        moment[start, chunk].addmm_(x[:, start].T, x[:, chunk], beta=old, alpha=new)


def mirror(moment: torch.Tensor) -> None:
    """Make a matrix that `add_second_moment` has summed symmetric, in place."""
    for chunk, below in _halves(len(moment)):
        moment[chunk, below].copy_(moment[below, chunk].T)


def _halves(size: int) -> Iterator[tuple[slice, slice]]:
    """Cut the columns of a symmetric matrix into blocks; yield each with the rows below it."""
    step = max(NARROWEST, -(-size // MOST_CHUNKS))
    for first in range(0, size, step):
        yield slice(first, min(first + step, size)), slice(first + step, None)


def activation_norm(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return sqrt(tr(E H E')) for E = `matrix` [out, in] and H = `hessian` [in, in], in float64: with H = E[x x'], the
    root of the layer's expected squared output error."""
    hessian, total = hessian.double(), 0.0
    for rows in row_chunks(*matrix.shape, device=matrix.device):
        part = matrix[rows].double()
        total += float(((part @ hessian) * part).sum())
    return max(total, 0.0) ** 0.5


def damped_cholesky(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Return the lower Cholesky factor of H + damp * mean(diag H) * I, with ten times the damping until it exists.

    Raises QinitError when even WORST_DAMPING is not enough.
    """
    mean = float(hessian.diagonal().mean())
    if mean == 0:
        return torch.eye(len(hessian), device=hessian.device)
    while damp <= WORST_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(factor.diagonal()).all():
            return factor
        damp = max(10 * damp, 1e-4)
    raise QinitError(
        f"the Hessian of {len(hessian)} inputs stays indefinite at {WORST_DAMPING:g} times its mean diagonal; "
        "its statistics are damaged, use other calibration text"
    )
