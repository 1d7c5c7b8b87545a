"""Time to solve one matrix, side by side: qinit, LoftQ with a full SVD, one NF4 pass of bitsandbytes, a copy.

    python benchmarks/speed.py [--sizes 896x4864,3584x3584,3584x18944] [--repeats 3] [--json FILE]

2 bits, group 64, rank 16, 5 iterations, float32 on the CPU, all in one process on one quiet machine; the
median of the repeats (LoftQ above 10M weights: one run). Matrices are random with a decaying spectrum, so
that the low rank has something to find.

The floor below which this algorithm cannot run on a machine, per weight:
  bandwidth    round 1 reads W three times (start, target, kernel) and moves 29 bytes; each later round reads
               W and the target, writes target, codes and residual, and reads the residual for the two
               products: about 33 bytes; the end reads codes and residual again: about 30
  arithmetic   the search: 16 ratios x 3 zero points in round 1, 5 x 3 after it, about 4 multiply-adds each
               per weight; the products: 4 x 24 columns x 2 per round
both divided by what a copy and a matrix product reach on the machine in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import conclude

from qinit.solver.methods import METHODS
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec

BITS, GROUP, RANK, ROUNDS = 2, 64, 16, 5
FLOOR_BYTES = 29 + 33 * (ROUNDS - 1) + 30
FLOOR_FLOPS = 2 * (4 * (16 * 3 + 5 * 3 * (ROUNDS - 1)) + 2 * 24 * (ROUNDS + 4 + 2) + 16 * (ROUNDS + 1))


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds over the repeats, and the last result."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def matrix(rows: int, columns: int) -> torch.Tensor:
    """Noise plus 64 directions of falling strength, at the scale of a trained layer."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, 64, generator=generator) * torch.logspace(0, -1, 64)
    right = torch.randn(64, columns, generator=generator)
    return 0.02 * (torch.randn(rows, columns, generator=generator) + 0.3 * left @ right)


def spec(name: str) -> LayerSpec:
    return LayerSpec(METHODS[name], BITS, GROUP, RANK, ROUNDS)


def measure(size: str, repeats: int, flops: float) -> dict[str, Any]:
    """Time everything on one size; `flops` is what a matrix product reaches per second."""
    import bitsandbytes.functional as bnb

    out_features, in_features = map(int, size.split("x"))
    weight = matrix(out_features, in_features)
    target = weight.clone()
    copy, _ = timed(lambda: target.copy_(weight), 5)
    eqft, ours = timed(lambda: solve(weight, spec("eqft")), repeats)
    loftq, theirs = timed(lambda: solve(weight, spec("loftq")), 1 if weight.numel() > 1e7 else repeats)
    nf4, _ = timed(lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"), repeats)
    bandwidth = 8 * weight.numel() / copy
    floor = weight.numel() * max(FLOOR_BYTES / bandwidth, FLOOR_FLOPS / flops)
    return {
        "size": size,
        "eqft_seconds": eqft,
        "loftq_seconds": loftq,
        "nf4_seconds": nf4,
        "copy_seconds": copy,
        "bandwidth": bandwidth,
        "loftq_to_eqft": loftq / eqft,
        "eqft_to_nf4": eqft / nf4,
        "eqft_to_floor": eqft / floor,
        "eqft_error": ours.error,
        "loftq_error": theirs.error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", default="896x4864,3584x3584,3584x18944")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    solve(matrix(64, 256), spec("eqft"))  # compile or load the kernel
    square = torch.randn(3584, 3584)
    flops = 2 * 3584**3 / timed(lambda: square @ square, 3)[0]
    rows = [measure(size, options.repeats, flops) for size in options.sizes.split(",")]
    conclude("speed", {"threads": torch.get_num_threads(), "flops": flops, "rows": rows}, options.json)


if __name__ == "__main__":
    main()
