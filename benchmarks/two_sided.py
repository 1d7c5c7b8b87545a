"""Rounding with feedback between the rows too, under G: what `benchmarks/calibration.py` tries as two-sided.

tr(G E H E') with G = M C M' is a sum over rows of what M' E costs under H, so rows can also make good what those
rounded before them have left (as YAQA, arXiv:2505.22988). G is a diagonal and a few directions, so rows are taken in
chunks: between chunks the feedback is exact, within one the rows are rounded one by one, by qinit's own kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from qinit.grids.base import Quantized
from qinit.grids.integer.grid import IntegerGrid
from qinit.linalg.chunks import ALL
from qinit.linalg.hessian import Hessian, damped_cholesky
from qinit.linalg.low_rank import OutputMetric

CHUNK = 32  # rows


class TwoSided(IntegerGrid):
    """The integer grid with that rounding; `metric` is to be set for each layer."""

    metric: OutputMetric | None = None

    def round_gptq(
        self,
        target: torch.Tensor,
        hessian: Hessian,
        *,
        factor: torch.Tensor | None = None,
        shards: Sequence[slice] = (ALL,),
        **options: Any,
    ) -> tuple[Quantized, torch.Tensor]:
        """As the integer grid, from the last chunk to the first, each with those before it in view: all rows."""
        if self.metric is None:
            return super().round_gptq(target, hessian, factor=factor, shards=shards, **options)
        if factor is None:
            factor = damped_cholesky(hessian, options["damp"])
        left = target.new_zeros(len(self.metric.leading), target.shape[1])  # R E of the rows that are done
        done, residuals = [], []
        for rows, answer in reversed(list(_answers(self.metric))):
            shift = answer @ left
            quantized, moved = super().round_gptq(target[rows] + shift, hessian, factor=factor.clone(), **options)
            residuals.append(moved - shift)
            done.append(quantized)
            left += self.metric.leading[:, rows] @ residuals[-1]
        parts = {name: torch.cat([getattr(q, name) for q in reversed(done)]) for name in ("codes", "scales", "zeros")}
        return replace(done[0], **parts), torch.cat(residuals[::-1])

    def descend(
        self,
        quantized: Quantized,
        residual: torch.Tensor,
        hessian: torch.Tensor,
        passes: int = 1,
        shards: Sequence[slice] = (ALL,),
    ) -> None:
        """As the integer grid, each chunk with all others in view: all rows."""
        if self.metric is None:
            super().descend(quantized, residual, hessian, passes, shards)
            return
        left = self.metric.leading @ residual
        for rows in reversed(_chunks(len(residual))):
            leading = self.metric.leading[:, rows].T
            others = left - leading.T @ residual[rows]
            shift = _answer(self.metric, rows, torch.eye(len(left))) @ others
            moved = residual[rows] + shift
            super().descend(quantized.rows(rows), moved, hessian, passes)
            residual[rows] = moved - shift
            left = others + leading.T @ residual[rows]


def _chunks(rows: int) -> list[slice]:
    return [slice(first, min(first + CHUNK, rows)) for first in range(0, rows, CHUNK)]


def _answer(metric: OutputMetric, rows: slice, known: torch.Tensor) -> torch.Tensor:
    """Return K [chunk, k]: with R E = S in other rows, the error -K S in these costs least under diag(d) + R' N R,
    N = `known` [k, k]."""
    leading = metric.leading[:, rows].double().T
    inner = leading @ known.double()
    return torch.linalg.solve(metric.rest[rows].double().diag() + inner @ leading.T, inner).float()


def _answers(metric: OutputMetric) -> Iterator[tuple[slice, torch.Tensor]]:
    """Eliminate chunk after chunk; each one's answer to the rows behind it, when those in front will answer too."""
    known = torch.eye(len(metric.leading), dtype=torch.float64)
    for rows in _chunks(len(metric.rest)):
        answer = _answer(metric, rows, known)
        yield rows, answer
        known = known - known @ metric.leading[:, rows].double() @ answer.double()
