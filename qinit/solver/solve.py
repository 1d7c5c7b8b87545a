"""The solver: one weight matrix in, quantized matrix and low-rank factors out. Pure and deterministic."""

from __future__ import annotations

from dataclasses import replace

import torch

from qinit.grids import Quantized
from qinit.linalg.hessian import output_norm
from qinit.linalg.low_rank import LowRank
from qinit.solver.calibrated import alternate
from qinit.solver.data_free import solve_data_free
from qinit.solver.published import solve_published
from qinit.solver.residual import frobenius, residual_norm, residual_of
from qinit.solver.spec import LayerSpec, Solution
from qinit.solver.starts import solve_start
from qinit.solver.statistics import Statistics

OUTPUT_ROWS = 256  # enough to know an output error to a few percent, and nearly free

Split = tuple[Quantized, LowRank, tuple[float, ...]]  # Q, L and the error after each round


def solve(weight: torch.Tensor, spec: LayerSpec, seed: int = 0, statistics: Statistics | None = None) -> Solution:
    """Split `weight` [out, in] (float32) into a quantized and a rank-r part, as the method's row says.

    `statistics` must hold what the row `needs`. The rank must not exceed min(out, in).
    """
    if spec.method.solver == "data-free":
        return solve_data_free(weight, spec, seed)
    if spec.method.solver == "start":
        found = _measured(weight, spec, (*solve_start(weight, spec, seed, statistics), ()), statistics)
        return replace(found, trace=(found.error,))
    if statistics is None:
        raise ValueError(f"method {spec.method.name} needs statistics of the layer's inputs")
    return _measured(weight, spec, SOLVERS[spec.method.solver](weight, spec, statistics, seed), statistics)


def _calibrated(weight: torch.Tensor, spec: LayerSpec, statistics: Statistics, seed: int) -> Split:
    quantized, approximation, trace = alternate(weight, spec, statistics, seed)
    return quantized, approximation.factors, trace


def _published(weight: torch.Tensor, spec: LayerSpec, statistics: Statistics, seed: int) -> Split:
    found = solve_published(weight, spec, statistics, seed)
    assert found.low_rank is not None
    return found.quantized, found.low_rank, found.trace


SOLVERS = {"calibrated": _calibrated, "published": _published}


def _measured(weight: torch.Tensor, spec: LayerSpec, split: Split, statistics: Statistics | None) -> Solution:
    """Measure a solution: exactly in the weights' norm, and where there are statistics at the output on OUTPUT_ROWS
    rows spread over the layer."""
    quantized, factors, trace = split
    residual = residual_of(weight, quantized, spec)
    norm = frobenius(weight)
    solution = Solution(
        quantized,
        factors,
        error=residual_norm(residual, factors) / norm if norm else 0.0,
        quantized_error=frobenius(residual) / norm if norm else 0.0,
        trace=trace,
    )
    if statistics is None:
        return solution
    rows = slice(0, None, max(1, len(weight) // OUTPUT_ROWS))
    left = torch.addmm(residual[rows], factors.B[rows], factors.A, alpha=-1)
    output = output_norm(weight[rows], statistics.hessian)
    return replace(
        solution,
        output_error=output_norm(left, statistics.hessian) / output if output else 0.0,
        quantized_output_error=output_norm(residual[rows], statistics.hessian) / output if output else 0.0,
    )
