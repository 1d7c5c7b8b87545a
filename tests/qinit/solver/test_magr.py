"""MagR: smaller weights, nearly the same outputs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinit.linalg.hessian import activation_norm
from qinit.solver.magr import _prox_limit, reduce_magnitude
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


SIZES = st.floats(0, 10, width=32)
ROWS_ALIKE = st.integers(1, 8).flatmap(lambda size: st.lists(st.lists(SIZES, min_size=size, max_size=size), min_size=1))


@given(ROWS_ALIKE, st.sampled_from([1e-4, 0.1, 3.0]))
def test_what_is_above_the_limit_adds_up_to_the_strength(rows, strength):
    magnitudes = torch.tensor(rows)
    limit = _prox_limit(magnitudes, strength)
    above = (magnitudes - limit[:, None]).clamp(min=0).sum(-1)
    wanted = torch.where(limit > 0, torch.tensor(strength), magnitudes.sum(-1))
    assert torch.allclose(above, wanted, rtol=1e-3, atol=1e-5)
    assert (above <= strength * (1 + 1e-3) + 1e-5).all()
    sums = magnitudes.double().sort(dim=-1, descending=True).values.cumsum(-1)  # the largest of these is the limit too
    best = ((sums - strength) / torch.arange(1, magnitudes.shape[1] + 1)).amax(-1).clamp(min=0)
    assert torch.allclose(limit.double(), best, rtol=1e-5, atol=1e-6)
