"""The solver with calibration: Q and L that are close to W where the layer's inputs are, not everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qinit.calibration.statistics import Statistics
from qinit.grids import GRIDS, Quantized
from qinit.lowrank import COLD_STEPS, Approximation, output_subspace, random_basis, without
from qinit.rounding import damped_cholesky, descend, round_gptq

if TYPE_CHECKING:
    from qinit.solver import LayerSpec

PREPARATIONS = 3  # rounds before the first where quantizing goes first: its codes must learn what the adapter repairs
WARM_STEPS = 2
FINAL_STEPS = 3
ROUNDING_DAMPING = 0.1  # what the adapter repairs is gone from H, so its smallest eigenvalues are zero
CORRECTION = 0.5  # how much of the drift is made good; more starts closer on the text and ends worse elsewhere
CORRECTION_DAMPING = 0.1
SHRINKAGE = 1.0  # of the diagonal, added to it: inputs that go together in the text need not do so in other domains
FLOOR = 1e-3  # of the mean diagonal, added too: inputs that the text never shows
TOKENS_PER_INPUT = 1  # below, H is singular
TRACE_ROWS = 64


def alternate(
    weight: torch.Tensor, spec: LayerSpec, statistics: Statistics, seed: int
) -> tuple[Quantized, Approximation, tuple[float, ...]]:
    """Minimise tr((T - Q - L) H (T - Q - L)') over Q on the integer grid and L of rank r.

    T is W, corrected for what the layers in front have left: see `corrected`. Low rank first (where
    `Method.low_rank_first` says so): L is fitted to T, and the rest is rounded with error feedback under the part of H
    that the adapter cannot repair (`without`). Quantize first: T is rounded under H, L fitted to the error, and the
    same is done with T - L, PREPARATIONS times in all, before the first round. Each round after the first sweeps over
    codes and scales under that part of H, which raises no error, and every round fits L again. Returns Q, L (fitted to
    Q as stored) and the error after each round relative to tr(T H T'), measured on TRACE_ROWS rows.
    """
    method, grid = spec.method, GRIDS[spec.method.grid]
    hessian = stable_hessian(statistics)
    target = corrected(weight, statistics)
    basis = random_basis(weight.shape[1], spec.rank, seed, weight.device)
    options: dict[str, Any] = {"bits": spec.bits, "group_size": spec.group_size, "search": method.search}
    feedback: dict[str, Any] = {"damp": ROUNDING_DAMPING, "act_order": method.act_order, "passes": method.passes}
    quantized: Quantized | None = None
    approximation: Approximation | None = None
    prepared = PREPARATIONS
    if method.low_rank_first(spec.bits, spec.rank, weight.shape):
        approximation = output_subspace(target, hessian, spec.rank, basis, COLD_STEPS)
        prepared = 0
    traced = slice(0, None, max(1, len(weight) // TRACE_ROWS))
    whole = output_norm(target[traced], hessian)
    trace = []
    for round_number in range(-prepared, spec.iterations):
        factors = approximation.factors if approximation is not None else None
        rest = target if factors is None else torch.addmm(target, factors.B, factors.A, alpha=-1)
        if method.rounding == "nearest":
            quantized, residual = grid.quantize(rest, target, previous=quantized, **options)
        else:
            seen = hessian if factors is None else without(hessian, factors.A)
            if quantized is None or round_number <= 0:
                quantized, residual = round_gptq(rest, seen, **feedback, **options)
            else:
                residual = rest.sub_(grid.dequantize(quantized))
                if method.passes:
                    descend(quantized, residual, seen, method.passes)
            if factors is not None:
                residual.addmm_(factors.B, factors.A)
        if spec.storage not in (None, torch.float32):
            residual = target - grid.dequantize(quantized).to(spec.storage).float()
        if approximation is None:
            approximation = output_subspace(residual, hessian, spec.rank, basis, COLD_STEPS)
        else:
            steps = FINAL_STEPS if round_number + 1 == spec.iterations else WARM_STEPS
            approximation = output_subspace(residual, hessian, spec.rank, approximation.basis, steps)
        if round_number >= 0:
            left = torch.addmm(residual[traced], approximation.factors.B[traced], approximation.factors.A, alpha=-1)
            trace.append(output_norm(left, hessian) / whole if whole else 0.0)
    assert quantized is not None
    assert approximation is not None
    return quantized, approximation, tuple(trace)


def stable_hessian(statistics: Statistics) -> torch.Tensor:
    """Return H + s diag(H) + f I: the inputs' correlations shrunk to 1 / (1 + s), more if there are few tokens per
    input. Relative to each input's own power, as real models have a few inputs that dwarf the mean."""
    hessian = statistics.hessian.clone()
    scarcity = max(1.0, TOKENS_PER_INPUT * len(hessian) / max(statistics.tokens, 1))
    power = hessian.diagonal().clone()
    hessian.diagonal().add_(power, alpha=SHRINKAGE * scarcity).add_(FLOOR * scarcity * float(power.mean()))
    return hessian


def corrected(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Return T = W + c D (H + d I)^-1, D = E[d x'] the drift at the layer's output: the least-squares weight that
    also makes good, by the share c, what the layers in front have left of their own error (as GPTAQ's asymmetric
    calibration, arXiv:2504.02692, equation 6, here for the residual stream too)."""
    if statistics.drift is None:
        return weight
    factor = damped_cholesky(statistics.hessian, CORRECTION_DAMPING)
    half = torch.linalg.solve_triangular(factor.T, statistics.drift, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False).mul_(CORRECTION).add_(weight)


def output_norm(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return sqrt(tr(M H M')): the root mean square of the output that M [out, in] makes of the layer's inputs."""
    return max(float(((matrix @ hessian) * matrix).sum(dtype=torch.float64)), 0.0) ** 0.5
