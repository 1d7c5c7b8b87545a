"""What calibration costs per layer: the solver against one GPTQ rounding, the exact low rank against its closed form.

    OMP_WAIT_POLICY=passive python benchmarks/calibration_cost.py [--sizes 2048,4096] [--json FILE]

Square layers, 2 bits, group 64, rank 16, inputs with a spectrum like a real layer's. The closed form is QERA's, the
eigendecomposition of H and a full SVD, once in float64 as published and once in float32; ours runs until its objective
is within 0.1 % of it. GPTQ alone is qinit's own fused rounding on the same H, which needs one Cholesky factor; `GPTQ by
H^-1` is the same kernel with the factor as published (Cholesky of H, its inverse, Cholesky of that).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import conclude

from qinit.calibration.output_metric import DIRECTIONS
from qinit.grids import GRIDS
from qinit.grids.integer.rounding import round_gptq
from qinit.linalg.low_rank import COLD_STEPS, OutputMetric, output_subspace, random_basis
from qinit.solver.methods import CALIBRATED
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec
from qinit.solver.statistics import Statistics

BITS, GROUP, RANK = 2, 64, 16


def timed(action: Callable[[], Any], runs: int = 3) -> tuple[float, Any]:
    """Return the least of the times (seconds) and the last result."""
    best, result = float("inf"), None
    for _ in range(runs):
        started = time.perf_counter()
        result = action()
        best = min(best, time.perf_counter() - started)
    return best, result


def inputs(size: int) -> torch.Tensor:
    """H of inputs whose standard deviations fall by a power law, in a random basis."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2 * size, size, generator=generator) * torch.arange(1, size + 1).float().pow(-0.7)
    tokens = tokens @ torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return tokens.T @ tokens / len(tokens)


def by_eigendecomposition(residual: torch.Tensor, hessian: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """QERA-exact: SVD of E H^(1/2), taken back by the inverse root."""
    values, vectors = torch.linalg.eigh(hessian.to(dtype))
    values = values.clamp(min=float(values[-1]) * 1e-12)
    U, S, Vh = torch.linalg.svd(residual.to(dtype) @ (vectors * values.sqrt()) @ vectors.T, full_matrices=False)
    right = Vh[:RANK] @ (vectors / values.sqrt()) @ vectors.T
    return ((U[:, :RANK] * S[:RANK]) @ right).float()


def published_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H^-1, as GPTQ's released code finds it."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def objective(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((matrix @ hessian) * matrix).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", default="2048,4096")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    row = CALIBRATED["eqft"]
    warm = inputs(256)
    solve(torch.randn(256, 256), LayerSpec(row, BITS, GROUP, RANK, 2), 0, Statistics(warm, warm.diagonal(), 512, warm))
    rows = []
    for size in map(int, options.sizes.split(",")):
        generator = torch.Generator().manual_seed(1)
        weight, hessian = torch.randn(size, size, generator=generator) * 0.02, inputs(size)
        drift = 0.05 * weight @ hessian
        spec = LayerSpec(row, BITS, GROUP, RANK, row.iterations)
        gptq, (quantized, _) = timed(
            lambda w=weight, h=hessian: round_gptq(w, h, bits=BITS, group_size=GROUP, search="mse")
        )
        factor, _ = timed(lambda h=hessian: torch.linalg.cholesky(h))
        published, _ = timed(lambda h=hessian: published_factor(h))
        metric = OutputMetric(torch.randn(DIRECTIONS, size, generator=generator), torch.ones(size))
        alone = Statistics(hessian, hessian.diagonal(), 10**6, output_metric=metric)
        plain, _ = timed(lambda s=alone: solve(weight, spec, 0, s))  # noqa: B023
        drifted = replace(alone, drift=drift)
        full, _ = timed(lambda s=drifted: solve(weight, spec, 0, s))  # noqa: B023
        residual = weight - GRIDS["int"].dequantize(quantized)
        exact64, closed = timed(lambda: by_eigendecomposition(residual, hessian, torch.float64), 1)  # noqa: B023
        exact32, _ = timed(lambda: by_eigendecomposition(residual, hessian, torch.float32), 1)  # noqa: B023
        best = objective(residual - closed, hessian)
        basis = random_basis(size, RANK, 0, weight.device)
        for steps in range(COLD_STEPS, 1000, 4):
            ours, found = timed(lambda: output_subspace(residual, hessian, RANK, basis, steps))  # noqa: B023
            reached = objective(residual - found.factors.B @ found.factors.A, hessian) / best
            if reached < 1.001:
                break
        rows.append(
            {
                "size": size,
                "gptq_s": gptq,
                "gptq_by_inverse_s": gptq + published - factor,
                "solver_parallel_s": plain,
                "solver_sequential_s": full,
                "low_rank_s": ours,
                "low_rank_steps": steps,
                "low_rank_objective": reached,
                "closed_form_float64_s": exact64,
                "closed_form_float32_s": exact32,
            }
        )
    conclude("calibration-cost", {"threads": torch.get_num_threads(), "rank": RANK, "rows": rows}, options.json)


if __name__ == "__main__":
    main()
