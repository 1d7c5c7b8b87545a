import numpy as np
import pytest
import torch
from scipy.stats import norm

from qinit.grids import GRIDS
from qinit.grids.normal_float import levels
from tests.helpers import gauss

NF = GRIDS["nf"]


def published_levels(bits: int) -> np.ndarray:
    """`create_normal_map` of QLoRA, as LoftQ generalises it: an asymmetric map with an exact zero."""
    offset = 0.9677083
    size = 2**bits
    positive = norm.ppf(np.linspace(offset, 0.5, size // 2 + 1)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, size // 2)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative]))
    return values / values.max()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_the_published_ones(bits):
    found = levels(bits)
    assert found.dtype == torch.float32
    assert found.numel() == 2**bits
    assert 0.0 in found.tolist()
    assert (found.diff() > 0).all()
    np.testing.assert_allclose(found.numpy(), published_levels(bits), rtol=0, atol=1e-7)


def test_four_bits_are_bitsandbytes_nf4_code_by_code():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = gauss(32, 256, scale=0.02)
    quantized, residual = NF.quantize(weight, weight, bits=4, group_size=64, search="absmax")
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    their_codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).reshape(weight.shape)
    assert torch.equal(state.absmax, quantized.scales.flatten())
    # Both tables come from the same formula, theirs rounded to fewer digits, so that a value within that
    # rounding of the middle between two levels may fall to either side.
    table = levels(4)
    middles = (table[1:] + table[:-1]) / 2
    scaled = weight.reshape(-1, 64) / state.absmax[:, None]
    tie = ((scaled[..., None] - middles).abs().amin(-1) < 1e-6).reshape(weight.shape)
    assert torch.equal(quantized.codes[~tie], their_codes[~tie])
    assert tie.float().mean() < 1e-3
    theirs = functional.dequantize_4bit(packed, state)
    ours = NF.dequantize(quantized)
    torch.testing.assert_close(ours[~tie], theirs[~tie], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((weight - theirs).norm(), residual.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [64, 100, 40])
def test_values_are_the_nearest_levels_times_the_block_s_scale(bits, columns, search):
    weight = gauss(7, columns, scale=0.02)
    quantized, residual = NF.quantize(weight, weight, bits=bits, group_size=64, search=search)
    scale = quantized.scales.repeat_interleave(64, 1)[:, :columns]
    assert quantized.zeros is None
    assert torch.equal(NF.dequantize(quantized), levels(bits)[quantized.codes.int()] * scale)
    choices = levels(bits) * scale[..., None]
    nearest = (weight[..., None] - choices).abs().amin(-1)
    torch.testing.assert_close(residual.abs(), nearest, rtol=0, atol=1e-7)


def test_absmax_scales_are_the_largest_magnitudes_of_the_blocks():
    weight = gauss(5, 100, scale=0.02)
    quantized, _ = NF.quantize(weight, weight, bits=2, group_size=64, search="absmax")
    expected = torch.stack([weight[:, :64].abs().amax(1), weight[:, 64:].abs().amax(1)], 1)
    assert torch.equal(quantized.scales, expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_mse_search_is_no_worse_than_absmax(bits):
    weight = gauss(32, 256, scale=0.02)
    errors = {}
    for search in ("absmax", "mse"):
        _, residual = NF.quantize(weight, weight, bits=bits, group_size=64, search=search)
        errors[search] = residual.reshape(32, 4, 64).double().square().sum(-1)
    assert (errors["mse"] <= errors["absmax"] * (1 + 1e-6)).all()
    assert errors["mse"].sum() < 0.99 * errors["absmax"].sum()


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zeros_stay_zeros_and_positive_constants_are_exact(bits, search):
    weight = torch.zeros(2, 128)
    weight[0, :64] = 0.3
    quantized, _ = NF.quantize(weight, weight, bits=bits, group_size=64, search=search)
    assert torch.isfinite(quantized.scales).all()
    torch.testing.assert_close(NF.dequantize(quantized), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 128), (128, 1), (1, 1)])
def test_single_rows_and_columns(shape):
    weight = gauss(*shape, scale=0.02)
    quantized, residual = NF.quantize(weight, weight, bits=2, group_size=64, search="mse")
    assert quantized.codes.shape == residual.shape == shape
    assert residual.norm() < weight.norm()
