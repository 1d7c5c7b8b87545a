"""The solver with calibration: Q and L that are close to W where the layer's inputs are, not everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from qinit.grids import Quantized
from qinit.linalg.hessian import Hessian, corrected, damped_cholesky, output_norm, without
from qinit.linalg.low_rank import COLD_STEPS, Approximation, LowRank, output_subspace, random_basis
from qinit.machine import CPU
from qinit.processes.rows import Rows
from qinit.solver.spec import LayerSpec
from qinit.solver.statistics import Statistics

WARM_STEPS = 2
FINAL_STEPS = 3
DAMPING = 0.1  # of H's mean diagonal: what the adapter repairs is gone from H, so its smallest eigenvalues are zero
SHRINKAGE = 0.3  # of the diagonal, added to it: inputs that go together in the text need not do so in other domains
FLOOR = 1e-3  # of the mean diagonal, added too: inputs that the text never shows
TOKENS_PER_INPUT = 1  # below, H is singular
TRACE_ROWS = 64


def alternate(
    weight: torch.Tensor, spec: LayerSpec, statistics: Statistics, seed: int
) -> tuple[Quantized, Approximation, tuple[float, ...]]:
    """Minimise tr((T - Q - L) H (T - Q - L)') over Q on the integer grid, and tr(G (T - Q - L) H (T - Q - L)') over
    L of rank r (0: none), G the metric of the outputs in the statistics (None: the identity).

    T is W, corrected for what the layers in front have left: see `corrected`. Quantize first: T is rounded with error
    feedback under H, and then anew under the part of H that the adapter cannot repair (`without`), which leaves to L
    what L has found; so in every round but the last, and twice at least. Low rank first (where
    `Method.low_rank_first` says so): L is fitted to T, and the rest rounded under that part of H, once. The rounds that
    remain sweep over codes and scales under it, which raises no error, and every round fits L again. Returns Q, L
    (fitted to Q as stored) and the error after each round relative to tr(T H T'), measured on TRACE_ROWS rows.
    Where the specification has several processes, all of them call it with the same, and each rounds some of the rows.
    """
    with stable_hessian(statistics) as hessian:
        return _alternate(weight, spec, statistics, hessian, seed)


def _alternate(
    weight: torch.Tensor, spec: LayerSpec, statistics: Statistics, hessian: torch.Tensor, seed: int
) -> tuple[Quantized, Approximation, tuple[float, ...]]:
    """Do it under the stable H."""
    method, grid = spec.method, spec.grid
    rows = Rows(len(weight), weight.device, spec.processes)
    target, factor = weight, None
    if statistics.drift is not None:
        factor = damped_cholesky(hessian, DAMPING)
        room = statistics.drift if statistics.own and weight.device == CPU else None
        target = corrected(weight, statistics.drift, factor, room, rows.own)
        rows.complete(target)
    basis = random_basis(weight.shape[1], spec.rank, seed, weight.device)
    asked: dict[str, Any] = {"bits": spec.bits, "group_size": spec.group_size, "search": method.search}
    options = {**asked, "damp": DAMPING, "act_order": method.act_order}
    quantized: Quantized | None = None
    approximation: Approximation | None = None
    roundings = max(2, spec.iterations - 1)
    if not spec.rank:  # Q alone
        nothing = LowRank.none(*weight.shape).to(weight.device)
        approximation, roundings = Approximation(nothing, basis, captured=0.0), 1
    if method.low_rank_first(spec.bits, spec.rank, weight.shape):
        approximation = output_subspace(target, hessian, spec.rank, basis, COLD_STEPS, statistics.output_metric)
        factor, roundings = None, 1
    traced = slice(0, None, max(1, len(weight) // TRACE_ROWS))
    whole = output_norm(target[traced], hessian)
    trace = []
    for round_number in range(spec.iterations):
        factors = approximation.factors if approximation is not None else None
        rest = target if factors is None else torch.addmm(target, factors.B, factors.A, alpha=-1)
        if method.rounding == "nearest":
            quantized, residual = grid.quantize(rest, target, previous=quantized, **asked)
        else:
            seen: Hessian = hessian
            if factors is not None and spec.rank:
                seen = partial(without, hessian, factors.A)
            if quantized is None or round_number < roundings:
                quantized = None  # the one before is not needed
                options |= {"factor": factor, "in_place": rest is not target}
                quantized, residual = grid.round_gptq(rest, seen, shards=rows.own, **options)
                options["factor"] = factor = None
            else:
                residual = rest.sub_(grid.dequantize(quantized))
                grid.descend(quantized, residual, seen() if callable(seen) else seen, method.passes, rows.own)
            rows.complete(residual, *quantized.tensors)
            if factors is not None:
                residual.addmm_(factors.B, factors.A)
        if spec.storage not in (None, torch.float32):
            residual = target - grid.dequantize(quantized).to(spec.storage).float()
        if approximation is None:
            approximation = output_subspace(residual, hessian, spec.rank, basis, COLD_STEPS, statistics.output_metric)
        elif spec.rank:
            steps = FINAL_STEPS if round_number + 1 == spec.iterations else WARM_STEPS
            basis = approximation.basis
            approximation = output_subspace(residual, hessian, spec.rank, basis, steps, statistics.output_metric)
        left = torch.addmm(residual[traced], approximation.factors.B[traced], approximation.factors.A, alpha=-1)
        trace.append(output_norm(left, hessian) / whole if whole else 0.0)
        del rest, residual  # before the next are made
    assert quantized is not None
    assert approximation is not None
    return quantized, approximation, tuple(trace)


@contextmanager
def stable_hessian(statistics: Statistics) -> Iterator[torch.Tensor]:
    """Give H + s diag(H) + f I: the inputs' correlations shrunk to 1 / (1 + s), more if there are few tokens per
    input. Relative to each input's own power, as real models have a few inputs that dwarf the mean. It is H itself with
    another diagonal meanwhile, as a second matrix [in, in] is much for a wide layer."""
    hessian = statistics.hessian
    scarcity = max(1.0, TOKENS_PER_INPUT * len(hessian) / max(statistics.tokens + statistics.shared, 1))
    power = hessian.diagonal().clone()
    try:
        hessian.diagonal().add_(power, alpha=SHRINKAGE * scarcity).add_(FLOOR * scarcity * float(power.mean()))
        yield hessian
    finally:
        hessian.diagonal().copy_(power)
