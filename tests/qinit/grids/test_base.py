import pytest
import torch

from qinit.errors import QinitError
from qinit.grids import GRIDS
from tests.helpers import gauss

CODED = [name for name in GRIDS if name != "exact"]


@pytest.mark.parametrize(
    ("grid", "bits", "search"),
    [(name, bits, search) for name in CODED for bits in GRIDS[name].bits for search in GRIDS[name].searches],
)
def test_every_grid_keeps_the_promises_of_the_interface(grid, bits, search):
    weight = gauss(5, 40, seed=bits)
    kept = weight.clone()
    quantized, residual = GRIDS[grid].quantize(weight, weight, bits=bits, group_size=16, search=search)
    assert torch.equal(weight, kept)  # the input is not written to
    assert (quantized.bits, quantized.group_size) == (bits, 16)
    assert quantized.codes.shape == (5, 40)
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) < 2**bits
    assert quantized.scales.shape == (5, 3)  # 40 inputs: two whole groups and a short one
    values = GRIDS[grid].dequantize(quantized)
    assert values.dtype == residual.dtype == torch.float32
    torch.testing.assert_close(residual, weight - values, rtol=0, atol=1e-6)
    for row in values.split(16, dim=1):
        assert all(len(group.unique()) <= 2**bits for group in row)
    assert residual.norm() < weight.norm()


@pytest.mark.parametrize("grid", [name for name, grid in GRIDS.items() if not grid.feeds_back])
def test_a_grid_that_rounds_to_nearest_only_says_so(grid):
    weight = torch.zeros(2, 32)
    quantized, residual = GRIDS[grid].quantize(weight, weight, bits=2, group_size=32, search=GRIDS[grid].searches[0])
    with pytest.raises(QinitError, match=f"^grid {grid} rounds to nearest only; use a method whose rounding is"):
        GRIDS[grid].round_gptq(weight, torch.eye(32), bits=2, group_size=32, search=GRIDS[grid].searches[0])
    with pytest.raises(QinitError, match="nearest only"):
        GRIDS[grid].descend(quantized, residual, torch.eye(32))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_target_is_rounded_and_the_residual_is_the_weight_s(grid):
    generator = torch.Generator().manual_seed(0)
    weight, target = torch.randn(4, 64, generator=generator), torch.randn(4, 64, generator=generator)
    search = GRIDS[grid].searches[0]
    quantized, residual = GRIDS[grid].quantize(target, weight, bits=2, group_size=32, search=search)
    expected, _ = GRIDS[grid].quantize(target, target, bits=2, group_size=32, search=search)
    assert torch.equal(quantized.codes, expected.codes)
    assert torch.equal(quantized.scales, expected.scales)
    torch.testing.assert_close(residual, weight - GRIDS[grid].dequantize(quantized), rtol=0, atol=1e-6)


def test_bits_per_weight_count_what_is_stored_beside_the_codes():
    assert GRIDS["int"].bits_per_weight(2, 64) == 2 + (16 + 2) / 64  # a float16 scale and a zero of 2 bits
    assert GRIDS["int"].bits_per_weight(4, 128) == 4 + (16 + 4) / 128
    assert GRIDS["nf"].bits_per_weight(2, 64) == 2 + 32 / 64  # a float32 absmax
