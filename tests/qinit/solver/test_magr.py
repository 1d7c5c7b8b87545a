"""MagR: smaller weights, nearly the same outputs."""

from itertools import pairwise

import pytest
import torch

from qinit.linalg.hessian import activation_norm
from qinit.solver.magr import reduce_magnitude
from tests.layers import COLUMNS, GROUP, ROWS, statistics, weights


def test_magr_shrinks_the_largest_weights_and_hardly_the_outputs():
    weight, seen = weights(structure=0.0), statistics(tokens=64)  # two thirds of the directions are free
    reduced = reduce_magnitude(weight, seen.hessian, GROUP)
    before, after = (w.reshape(ROWS, -1, GROUP).abs().amax(-1) for w in (weight, reduced))
    assert (after <= before + 1e-6).all()
    assert float(after.mean()) <= 0.85 * float(before.mean())
    lost = activation_norm(reduced - weight, seen.hessian) / activation_norm(weight, seen.hessian)
    assert lost <= 0.02
    assert (reduced - weight).norm() > 5 * lost * weight.norm()


@pytest.mark.parametrize("shape", [(5, 128), (5, 100), (1, 1)])
def test_magr_lowers_its_objective_step_by_step(shape):
    weight, hessian = weights(*shape), statistics(shape[1], tokens=64).hessian
    scaled = hessian / torch.linalg.matrix_norm(hessian, 2)

    def objective(reduced: torch.Tensor) -> float:
        padded = torch.nn.functional.pad(reduced, (0, -shape[1] % GROUP)).reshape(shape[0], -1, GROUP)
        return activation_norm(reduced - weight, scaled) ** 2 / 2 + 1e-4 * float(padded.abs().amax(-1).sum())

    values = [objective(reduce_magnitude(weight, hessian, GROUP, steps=steps)) for steps in (0, 1, 10, 50, 200)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(values))
    assert values[-1] < values[0]


def test_magr_leaves_weights_alone_that_no_input_reaches():
    weight = weights()
    assert torch.equal(reduce_magnitude(weight, torch.zeros(COLUMNS, COLUMNS), GROUP), weight)
