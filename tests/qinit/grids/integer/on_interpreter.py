"""The GPU kernels in Triton's interpreter, which runs them on a CPU, against plain torch: prints nothing, fails loudly.

Run by a test in a process of its own, as Triton decides at import what runs its functions.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from qinit.grids.integer.block import Block
from qinit.grids.integer.candidates import NEARBY, REFINEMENTS, clip_ratios, zero_points
from qinit.grids.integer.rounding_torch import descend_block_torch, feed_back_block_torch
from qinit.grids.integer.rounding_triton import descend_block_triton, feed_back_block_triton
from qinit.grids.integer.search_torch import quantize_torch
from qinit.grids.integer.search_triton import quantize_triton

ROWS, COLUMNS, GROUP = 5, 40, 16  # a short last group, and rows that fill no program


def search(bits: int) -> None:
    weight = torch.randn(ROWS, COLUMNS) * 0.02
    for symmetric in (False, True):
        previous = None
        for ratios in (clip_ratios(bits), torch.tensor(NEARBY), torch.ones(1)):
            arguments = (weight, weight, bits, GROUP, ratios, REFINEMENTS * (len(ratios) > 1), previous)
            expected, residual = quantize_torch(*arguments, zero_points(bits, symmetric))
            found, left = quantize_triton(*arguments, zero_points(bits, symmetric))
            alike(found, expected)
            torch.testing.assert_close(left, residual)
            previous = expected


def rounding(bits: int) -> None:
    x = torch.randn(4 * COLUMNS, COLUMNS) * torch.rand(COLUMNS)
    hessian = (x + x[:, :1]).T @ (x + x[:, :1]) / len(x)
    factor = torch.linalg.cholesky(hessian + 0.1 * torch.eye(COLUMNS))
    weights, factor = factor.diagonal().square(), (factor / factor.diagonal()).contiguous()
    target = torch.randn(ROWS, COLUMNS) * 0.02
    order = torch.randperm(COLUMNS)
    block = Block(slice(0, COLUMNS), 2**bits - 1, GROUP, clip_ratios(bits), REFINEMENTS, (0, 2**bits - 1))
    given = Block(slice(0, COLUMNS), 2**bits - 1, GROUP, torch.empty(0), 0, (0, 0))
    start = quantize_torch(target, target, bits, GROUP, clip_ratios(bits), REFINEMENTS, None, (0, 2**bits - 1))[0]
    for columns, group_of in ((block, torch.arange(COLUMNS) // GROUP), (given, order // GROUP)):
        results = []
        for feed_back, descend in (
            (feed_back_block_torch, descend_block_torch),
            (feed_back_block_triton, descend_block_triton),
        ):
            quantized = type(start)(bits, GROUP, *(part.clone() for part in (start.codes, start.scales, start.zeros)))
            residual = torch.empty_like(target)
            feed_back(columns, quantized, target, target.clone(), residual, factor, weights, group_of)
            results.append((quantized, residual.clone()))
            if columns is block:
                descend(given, quantized, residual @ hessian, residual, hessian, 2)
                results[-1] = (quantized, residual)
        alike(results[1][0], results[0][0])
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-7)


def alike(found, expected) -> None:
    for name in ("codes", "zeros", "scales"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name)


if __name__ == "__main__":
    torch.manual_seed(0)
    search(3)
    rounding(2)
