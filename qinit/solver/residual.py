"""What Q leaves of a weight, as a loader will see it."""

from __future__ import annotations

from math import isclose

import torch

from qinit.grids import Quantized
from qinit.linalg.chunks import row_chunks
from qinit.linalg.low_rank import LowRank
from qinit.solver.spec import LayerSpec

# The errors are norms of differences of float32 numbers: the factors were rounded once more when they were stored, and
# another device adds in another order. The first moves an error by some 1e-7 of itself, the second by less than 1e-5.
# 1e-6 of the weight's own norm is far below the error of any grid, and lets a layer pass whose error is 0.
RELATIVE, ABSOLUTE = 1e-4, 1e-6


def as_loaded(quantized: Quantized, spec: LayerSpec) -> torch.Tensor:
    """Return Q [out, in] in float32 exactly as a loader will see it."""
    values = spec.grid.dequantize(quantized)
    return values if spec.storage is None else values.copy_(values.to(spec.storage))


def residual_of(weight: torch.Tensor, quantized: Quantized, spec: LayerSpec) -> torch.Tensor:
    """Return W - Q [out, in]."""
    return as_loaded(quantized, spec).neg_().add_(weight)


def residual_norm(residual: torch.Tensor, low_rank: LowRank | None) -> float:
    """Return the Frobenius norm of `residual - B A`, never holding that matrix whole."""
    if low_rank is None:
        return frobenius(residual)
    parts = [
        torch.linalg.vector_norm(torch.addmm(residual[rows], low_rank.B[rows], low_rank.A, alpha=-1), dim=1)
        for rows in row_chunks(*residual.shape, device=residual.device)
    ]
    return float(torch.cat(parts).double().norm())


def frobenius(matrix: torch.Tensor) -> float:
    """Return the Frobenius norm: float32 along a row, float64 over the rows, one pass and no copy."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().norm())


def relative_errors(weight: torch.Tensor, quantized: torch.Tensor, low_rank: LowRank) -> tuple[float, float]:
    """Return the errors of Q alone and of Q + B A (all [out, in], float32, on one device), relative to the weight; 0
    for a weight of zeros."""
    size, residual = frobenius(weight), weight - quantized
    return (frobenius(residual) / size, residual_norm(residual, low_rank) / size) if size else (0.0, 0.0)


def same_error(measured: float, expected: float) -> bool:
    """Whether two measurements of one relative error agree, be they made on different devices."""
    return isclose(measured, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
