"""What H = E[x x'], the second moment of a layer's inputs, makes of matrices: norms, factors, corrections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from qinit.errors import QinitError
from qinit.linalg.chunks import ALL
from qinit.linalg.low_rank import symmetric

WORST_DAMPING = 10.0
NARROWEST = 256  # columns of a symmetric matrix that are computed at once, at least
MOST_CHUNKS = 8  # into which they are cut
ROWS = 1024  # of a matrix that are solved for at once

Hessian = torch.Tensor | Callable[[], torch.Tensor]  # or what makes it anew, where nobody else needs it


def corrected(
    weight: torch.Tensor,
    drift: torch.Tensor,
    factor: torch.Tensor,
    out: torch.Tensor | None = None,
    shards: Sequence[slice] = (ALL,),
) -> torch.Tensor:
    """Return T = W + D (C C')^-1, D = E[d x'] [out, in] the `drift` at the layer's output, C [in, in] the Cholesky
    `factor` of the H that is rounded under: the least-squares weight that also makes good what the layers in front
    have left of their own error (as GPTAQ's asymmetric calibration, arXiv:2504.02692, equation 6, here for the
    residual stream too), in so far as that H vouches for it. T is put into `out`, which may be the drift; of its rows
    only these `shards` are made."""
    target = torch.empty_like(weight) if out is None else out
    for shard in shards:
        parts = (matrix[shard].split(ROWS) for matrix in (weight, drift, target))
        for own, missing, result in zip(*parts, strict=True):
            half = torch.linalg.solve_triangular(factor.T, missing, upper=True, left=False)
            half = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
            torch.add(half, own, out=result)
    return target


def output_norm(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return sqrt(tr(M H M')): the root mean square of the output that M [out, in] makes of the layer's inputs."""
    return max(float(((matrix @ hessian) * matrix).sum(dtype=torch.float64)), 0.0) ** 0.5


def without(hessian: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Return H - H A' (A H A')^-1 A H: the part of H that no choice of B in B A can make good.

    min over B of tr((E - B A) H (E - B A)') is tr(E P E') with this P (as in ProjQ), so codes that are rounded
    under P leave to the adapter what it can repair. A [r, in] may have dependent rows. The columns of the result lie
    side by side, as `damped_cholesky` takes them without a copy.
    """
    image = hessian @ A.T
    inner = symmetric((A @ image).double())
    inner.diagonal().add_(1e-6 * float(inner.diagonal().mean()) + 1e-30)
    return torch.addmm(hessian, torch.linalg.solve(inner, image.T.double()).float().T, image.T, alpha=-1).T


def lower_blocks(size: int, device: torch.device) -> list[torch.Tensor]:
    """Return room for a symmetric matrix [size, size]: blocks of columns, each on and below the diagonal only, which
    saves nearly half of the memory and of the work. `squared` makes the matrix of them."""
    return [torch.zeros((size - chunk.start, chunk.stop - chunk.start), device=device) for chunk in _chunks(size)]


def add_second_moment(blocks: Sequence[torch.Tensor], x: torch.Tensor, old: float, new: float) -> None:
    """Set M to `old` M + `new` x' x in place for tokens x [tokens, n], M in `lower_blocks`."""
    for chunk, block in zip(_chunks(x.shape[1]), blocks, strict=True):
        block.addmm_(x[:, chunk.start :].T, x[:, chunk], beta=old, alpha=new)


def squared(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Return the symmetric matrix [n, n] that `lower_blocks` hold; they are given back as it is filled."""
    if len(blocks) == 1:
        return blocks.pop()
    size = len(blocks[0])
    matrix = torch.empty((size, size), device=blocks[0].device)
    for chunk in _chunks(size):
        block = blocks.pop(0)
        matrix[chunk.start :, chunk] = block
        matrix[chunk, chunk.stop :] = block[chunk.stop - chunk.start :].T
    return matrix


def _chunks(size: int) -> Iterator[slice]:
    """Cut the columns of a symmetric matrix into blocks."""
    step = max(NARROWEST, -(-size // MOST_CHUNKS))
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


def activation_norm(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return sqrt(tr(E H E')) for E = `matrix` [out, in] and H = `hessian` [in, in], in float64: with H = E[x x'], the
    root of the layer's expected squared output error."""
    total, matrix = 0.0, matrix.double()
    for columns in _chunks(len(hessian)):
        total += float(((matrix @ hessian[:, columns].double()) * matrix[:, columns]).sum())
    return max(total, 0.0) ** 0.5


def _by_columns(matrix: torch.Tensor) -> torch.Tensor:
    """Return a copy whose columns lie side by side."""
    return matrix.T.clone(memory_format=torch.contiguous_format).T


def damped_cholesky(hessian: Hessian, damp: float) -> torch.Tensor:
    """Return the lower Cholesky factor of H + damp * mean(diag H) * I, with ten times the damping until it exists. What
    a function returns is overwritten, which spares a matrix [in, in]; it is called again for more damping.

    Raises QinitError when even WORST_DAMPING is not enough.
    """
    make = hessian if callable(hessian) else partial(_by_columns, hessian)
    while damp <= WORST_DAMPING:
        damped = make()
        mean = float(damped.diagonal().mean())
        if mean == 0:
            return torch.eye(len(damped), device=damped.device)
        damped.diagonal().add_(damp * mean)
        failed = torch.empty((), dtype=torch.int32, device=damped.device)
        factor, _ = torch.linalg.cholesky_ex(damped, out=(damped, failed))
        if not failed and torch.isfinite(factor.diagonal()).all():
            return factor
        damp = max(10 * damp, 1e-4)
    raise QinitError(
        f"the Hessian of {len(damped)} inputs stays indefinite at {WORST_DAMPING:g} times its mean diagonal; "
        "its statistics are damaged, use other calibration text"
    )
