"""The steps that CUDA runs; on the CPU they are the kernels' reference, held against them in test_rounding_cpu.py."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from qinit.grids import GRIDS
from qinit.grids.base import Quantized
from qinit.grids.integer import rounding
from qinit.grids.integer.block import Block
from qinit.grids.integer.rounding_torch import descend_block_torch, feed_back_block_torch, fit_weighted
from tests.helpers import gauss
from tests.layers import correlated
from tests.qinit.grids.integer.test_rounding import error, rest


def test_scales_are_found_for_the_inputs_that_matter():
    """A column with nearly all of the weight is hit exactly; plain least squares would compromise."""
    x = torch.tensor([[0.9, -0.31, 0.17, 0.55], [0.1, 0.2, -0.7, 0.33]])
    weights = torch.tensor([1e-4, 4.0, 1e-4, 1e-4])
    scale, zero = fit_weighted(x, weights, 3, rounding.clip_ratios(2), rounding.REFINEMENTS, (0, 3))
    code = torch.floor(x / scale[:, None] + 0.5).clamp(min=-zero[:, None], max=3 - zero[:, None])
    assert ((x - scale[:, None] * code)[:, 1].abs() < 2e-3 * x[:, 1].abs()).all()


def test_weights_that_are_alike_change_nothing():
    x = gauss(16, 32, scale=0.02)
    ratios = rounding.clip_ratios(3)
    plain = fit_weighted(x, torch.ones(32), 7, ratios, 2, (0, 7))
    weighted = fit_weighted(x, torch.full((32,), 7.5), 7, ratios, 2, (0, 7))
    assert all(torch.equal(one, other) for one, other in zip(plain, weighted, strict=True))


@pytest.mark.parametrize("bits", [2, 3])
def test_the_weighted_scale_is_close_to_the_best_of_a_dense_sweep(bits):
    levels = 2**bits - 1
    x, weights = gauss(6, 16, scale=0.02), gauss(1, 16, seed=1)[0].square() + 0.05
    scale, zero = fit_weighted(x, weights, levels, rounding.clip_ratios(bits), rounding.REFINEMENTS, (0, levels))
    code = torch.floor(x / scale[:, None] + 0.5).clamp(min=-zero[:, None], max=levels - zero[:, None])
    found = (weights * (x - scale[:, None] * code).square()).sum(1)
    for row, error_found in zip(x.double().numpy(), found.tolist(), strict=True):
        least = np.inf
        for z in range(levels + 1):
            scales = np.linspace(1e-4, 2 * np.abs(row).max(), 3000)
            codes = np.clip(np.floor(row / scales[:, None] + 0.5), -z, levels - z)
            least = min(least, ((row - codes * scales[:, None]) ** 2 @ weights.double().numpy()).min())
        assert error_found <= 1.05 * least


def blank(rows, columns, group_size, bits=2):
    groups = -(-columns // group_size)
    return Quantized(
        *(bits, group_size, torch.zeros((rows, columns), dtype=torch.uint8)),
        *(torch.full((rows, groups), 0.5), torch.full((rows, groups), 1, dtype=torch.uint8)),
    )


def test_each_column_hands_its_error_to_those_in_front_of_it():
    """By hand: three columns, a scale of 0.5, zero point 1, so that the values are -0.5, 0, 0.5 and 1."""
    x = torch.tensor([[0.1, 0.3, 0.9]])
    feedback = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [1.0, 2.0, 1.0]])
    quantized, residual = blank(1, 3, 3), torch.empty(1, 3)
    block = Block(slice(0, 3), 3, 3, torch.empty(0), 0)
    feed_back_block_torch(block, quantized, x, x.clone(), residual, feedback, torch.ones(3), torch.zeros(3).long())
    # 0.9 -> 1, error -0.1; 0.3 - 0.2 = 0.1 -> 0, error 0.3; 0.1 - 0.1 + 0.15 = 0.15 -> 0, error 0.1
    assert (quantized.codes - quantized.zeros.int()).tolist() == [[0, 0, 2]]
    torch.testing.assert_close(residual, torch.tensor([[0.1, 0.3, -0.1]]))


@pytest.mark.parametrize("group_size", [8, 20])
def test_a_sweep_of_the_steps_never_raises_the_error(group_size):
    target, hessian = gauss(12, 40, scale=0.02), correlated(40)
    quantized, residual = GRIDS["int"].quantize(target, target, bits=3, group_size=group_size, search="mse")
    block = Block(slice(0, 40), 7, group_size, torch.empty(0), 0)
    errors = [error(residual, hessian)]
    for _ in range(4):
        descend_block_torch(block, quantized, residual @ hessian, residual, hessian, 1)
        torch.testing.assert_close(residual, rest(target, quantized), rtol=0, atol=1e-6)
        errors.append(error(residual, hessian))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]
    assert torch.equal(quantized.scales, quantized.scales.half().float())
