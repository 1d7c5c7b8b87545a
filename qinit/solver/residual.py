"""What Q leaves of a weight, as a loader will see it."""

from __future__ import annotations

import torch

from qinit.grids import GRIDS, Quantized
from qinit.linalg.chunks import row_chunks
from qinit.linalg.low_rank import LowRank
from qinit.solver.spec import LayerSpec


def as_loaded(quantized: Quantized, spec: LayerSpec) -> torch.Tensor:
    """Return Q [out, in] in float32 exactly as a loader will see it."""
    values = GRIDS[spec.method.grid].dequantize(quantized)
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
        for rows in row_chunks(*residual.shape)
    ]
    return float(torch.cat(parts).double().norm())


def frobenius(matrix: torch.Tensor) -> float:
    """Return the Frobenius norm: float32 along a row, float64 over the rows, one pass and no copy."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().norm())
