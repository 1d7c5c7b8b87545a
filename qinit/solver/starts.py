"""The published starts of LoRA that take a part of a full-precision weight into the adapter, or directions of its
inputs.

The base gets Q, W - L rounded to the method's grid, with L = s B A. PEFT has most of these as `init_lora_weights`;
there A and B are its own up to rounding and the signs of singular vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from qinit.grids import Quantized
from qinit.linalg.low_rank import LowRank, leading, random_basis, subspace
from qinit.solver.residual import frobenius
from qinit.solver.spec import LayerSpec
from qinit.solver.statistics import Statistics

DAMPING = 0.01  # of CorDA's covariance, relative to its mean diagonal
INPUT_STEPS = 16  # of subspace iteration, from twice as many directions as are wanted
STABLE_GAMMA = 16.0  # of LoRA-GA's "stable" scale, PEFT's default


def solve_start(
    weight: torch.Tensor, spec: LayerSpec, seed: int, statistics: Statistics | None
) -> tuple[Quantized, LowRank]:
    """Return Q and L = B A for a weight W [out, in] and the `factors` of the method's row:

    svd         PiSSA (arXiv:2404.02948): the r leading singular triplets of W, by a full decomposition, or by
                `spec.niter` power iterations from a random start
    minor       MiLoRA (arXiv:2406.09044): the r last ones
    qr          OLoRA (arXiv:2406.01775): the first r columns and rows of W = Q R
    covariance  CorDA, instruction-previewed (arXiv:2406.05223): U S V' of W C, C the damped second moment of the
                inputs; L = U_r S_r V_r' C^-1. The units of C decide how large A is and how small B; its authors' (and
                PEFT's) depend on the text's length and largest activation, here A and B have equal norms
    covariance-minor  the same, knowledge-preserved: of the r last triplets
    inputs      EVA (arXiv:2410.07170), without its redistribution of ranks (rho = 1): A the r leading directions of the
                inputs around their mean, B zero
    gradient    LoRA-GA (arXiv:2407.05000): A the r leading right singular vectors of the loss's gradient, B the next r
                left ones, each times its singular value, scaled as PEFT's "stable" does

    L is in the weight's own units, so what PEFT is to read unscaled carries the root of s. `seed` draws the random
    start of power iterations. `statistics` and `spec.gradient` must hold what the row needs.
    """
    assert spec.method.factors is not None
    low_rank = FACTORS[spec.method.factors](weight, spec, seed, statistics)
    moved = bool(low_rank.B.any())
    target = torch.addmm(weight, low_rank.B, low_rank.A, alpha=-1) if moved else weight
    quantized, _ = spec.grid.quantize(
        target, target, bits=spec.bits, group_size=spec.group_size, search=spec.method.search
    )
    return quantized, low_rank


def _singular(weight: torch.Tensor, spec: LayerSpec, seed: int, _statistics: Statistics | None) -> LowRank:
    if spec.niter is not None:
        basis = random_basis(weight.shape[1], spec.rank, seed, weight.device)
        return subspace(weight, spec.rank, basis, spec.niter + 1).factors
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return _balanced(U[:, : spec.rank], S[: spec.rank], Vh[: spec.rank])


def _minor(weight: torch.Tensor, spec: LayerSpec, _seed: int, _statistics: Statistics | None) -> LowRank:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return _balanced(U[:, -spec.rank :], S[-spec.rank :], Vh[-spec.rank :])


def _orthogonal(weight: torch.Tensor, spec: LayerSpec, _seed: int, _statistics: Statistics | None) -> LowRank:
    """The first r columns of W alone decide those of Q, and Q' W has the rows of R."""
    columns = torch.linalg.qr(weight[:, : spec.rank]).Q
    root = math.sqrt(spec.scale)
    return LowRank(columns * root, (columns.T @ weight).mul_(root))


def _covariance(weight: torch.Tensor, spec: LayerSpec, _seed: int, statistics: Statistics | None) -> LowRank:
    return _of_covariance(weight, slice(spec.rank), statistics)


def _covariance_minor(weight: torch.Tensor, spec: LayerSpec, _seed: int, statistics: Statistics | None) -> LowRank:
    return _of_covariance(weight, slice(-spec.rank, None), statistics)


def _of_covariance(weight: torch.Tensor, chosen: slice, statistics: Statistics | None) -> LowRank:
    assert statistics is not None
    covariance = statistics.hessian.to(torch.float64, copy=True)
    covariance.diagonal().add_(DAMPING * covariance.diagonal().mean())
    U, S, Vh = torch.linalg.svd(weight @ covariance.float(), full_matrices=False)
    V = torch.cholesky_solve(Vh[chosen].T.double(), torch.linalg.cholesky(covariance)).float()
    found = _balanced(U[:, chosen], S[chosen], V.T)
    if not found.B.any():
        return found
    ratio = (frobenius(found.A) / frobenius(found.B)) ** 0.5
    return LowRank(found.B * ratio, found.A / ratio)


def _inputs(weight: torch.Tensor, spec: LayerSpec, seed: int, statistics: Statistics | None) -> LowRank:
    assert statistics is not None
    assert statistics.mean is not None
    covariance = statistics.hessian - torch.outer(statistics.mean, statistics.mean)
    basis = random_basis(len(covariance), 2 * spec.rank, seed, covariance.device)
    A = leading(covariance, spec.rank, basis, INPUT_STEPS)[2]
    return LowRank(torch.zeros(len(weight), spec.rank, device=weight.device), A * math.sqrt(spec.scale))


def _gradient(weight: torch.Tensor, spec: LayerSpec, _seed: int, _statistics: Statistics | None) -> LowRank:
    assert spec.gradient is not None
    rank, gradient, root = spec.rank, spec.gradient, math.sqrt(spec.scale)
    stable = len(weight) ** 0.25 / math.sqrt(STABLE_GAMMA)
    B = gradient.U[:, rank : 2 * rank] * gradient.S[rank : 2 * rank] * stable
    return LowRank(B * root, gradient.Vh[:rank] * root)


def _balanced(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> LowRank:
    root = S.sqrt()
    return LowRank(U * root, root[:, None] * Vh)


FACTORS: dict[str, Callable[[torch.Tensor, LayerSpec, int, Statistics | None], LowRank]] = {
    "svd": _singular,
    "minor": _minor,
    "qr": _orthogonal,
    "covariance": _covariance,
    "covariance-minor": _covariance_minor,
    "inputs": _inputs,
    "gradient": _gradient,
}
