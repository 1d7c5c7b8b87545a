import pytest
import torch

from qinit.grids import GRIDS
from qinit.linalg import chunks
from qinit.linalg.low_rank import LowRank
from qinit.solver.methods import METHODS
from qinit.solver.residual import as_loaded, frobenius, relative_errors, residual_norm, residual_of, same_error
from qinit.solver.spec import LayerSpec
from tests.helpers import gauss


def asked(storage=None):
    return LayerSpec(METHODS["eqft"], 3, 32, 4, 1, storage)


@pytest.mark.parametrize("storage", [None, torch.float32, torch.float16, torch.bfloat16])
def test_q_is_what_the_storage_makes_of_it(storage):
    weight = gauss(24, 80, scale=0.02)
    quantized, _ = GRIDS["int"].quantize(weight, weight, bits=3, group_size=32, search="mse")
    values = GRIDS["int"].dequantize(quantized)
    stored = values if storage is None else values.to(storage).float()
    assert torch.equal(stored, values) == (storage in (None, torch.float32))
    assert torch.equal(as_loaded(quantized, asked(storage)), stored)
    assert torch.equal(residual_of(weight, quantized, asked(storage)), weight - stored)


@pytest.mark.parametrize("elements", [1, 100, 1 << 18])
def test_the_norm_of_what_is_left_is_the_same_in_pieces(elements, monkeypatch):
    monkeypatch.setitem(chunks.ROW_CHUNK_ELEMENTS, "cpu", elements)
    residual, low_rank = gauss(37, 50), LowRank(gauss(37, 4, seed=1), gauss(4, 50, seed=2))
    whole = residual.double() - low_rank.B.double() @ low_rank.A.double()
    assert residual_norm(residual, low_rank) == pytest.approx(float(whole.norm()), rel=1e-6)
    assert residual_norm(residual, None) == pytest.approx(float(residual.double().norm()), rel=1e-6)


def test_many_rows_are_added_up_without_losing_digits():
    """A float32 sum of squares would not see what is 2^24 times smaller than its largest."""
    rows = torch.full((1 << 20, 1), 1e-3)
    rows[0] = 3e3
    assert frobenius(rows) == pytest.approx((9e6 + (2**20 - 1) * 1e-6) ** 0.5, rel=1e-9)


def test_errors_are_relative_to_the_weight_and_a_weight_of_zeros_has_none():
    weight, quantized, low_rank = gauss(8, 12), gauss(8, 12, seed=1), LowRank(gauss(8, 2, seed=2), gauss(2, 12, seed=3))
    start, error = relative_errors(weight, quantized, low_rank)
    assert start == pytest.approx(float((weight - quantized).norm() / weight.norm()), rel=1e-6)
    whole = weight - quantized - low_rank.B @ low_rank.A
    assert error == pytest.approx(float(whole.norm() / weight.norm()), rel=1e-6)
    assert relative_errors(torch.zeros(8, 12), torch.zeros(8, 12), low_rank) == (0.0, 0.0)


def test_errors_agree_where_only_rounding_tells_them_apart():
    assert same_error(0.5 + 1e-6, 0.5)
    assert same_error(1e-7, 0.0)
    assert not same_error(0.501, 0.5)
