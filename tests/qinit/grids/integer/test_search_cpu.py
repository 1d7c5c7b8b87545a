import numba
import numpy as np
import pytest
import torch

from qinit.grids import GRIDS
from qinit.grids.integer import search_cpu as kernels
from qinit.grids.integer.search_torch import quantize_torch

INT = GRIDS["int"]
BITS = (2, 3, 4, 8)
SHAPES = [(37, 192, 64), (5, 100, 32), (3, 40, 64), (1, 64, 16)]  # rows, columns, group size


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, size=(rows, columns))).float() * 0.02


@pytest.fixture
def reference(monkeypatch):
    """The same call through plain torch: whatever the grid passes to its kernel goes to the reference."""

    def quantize(*arguments, grid="int", **options):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "quantize_cpu", quantize_torch)
            return GRIDS[grid].quantize(*arguments, **options)

    return quantize


def assert_the_same_quantization(found, expected):
    (quantized, residual), (other, other_residual) = found, expected
    # The order of a float32 sum decides between candidates that are equally good to the last bit. At 8 bits
    # the error is about 1e-5 of the group's energy, so that many are.
    tolerance, least = (1e-3, 0.8) if quantized.bits == 8 else (1e-4, 0.97)
    torch.testing.assert_close(residual.norm(), other_residual.norm(), rtol=tolerance, atol=1e-12)
    close = (quantized.scales - other.scales).abs() <= 2.0**-10 * other.scales
    assert (close & (quantized.zeros == other.zeros)).float().mean() >= least
    assert (quantized.codes == other.codes).float().mean() >= least


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize(("grid", "bits"), [("int", bits) for bits in BITS] + [("sym", bits) for bits in BITS[:3]])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_kernel_finds_what_the_torch_reference_finds(rows, columns, group_size, bits, search, grid, reference):
    target, weight = heavy_tailed(rows, columns), heavy_tailed(rows, columns, seed=1)
    options = {"bits": bits, "group_size": group_size, "search": search}
    for arguments in ((target, target), (target, weight)):
        found = GRIDS[grid].quantize(*arguments, **options)
        assert_the_same_quantization(found, reference(*arguments, grid=grid, **options))


@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_searches_around_a_previous_result_as_the_reference_does(bits, reference):
    weight = heavy_tailed(37, 192)
    options = {"bits": bits, "group_size": 64, "search": "mse"}
    options["previous"], _ = INT.quantize(weight, weight, **options)
    moved = weight + 0.1 * heavy_tailed(37, 192, seed=1)
    assert_the_same_quantization(INT.quantize(moved, moved, **options), reference(moved, moved, **options))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 64),
        torch.full((2, 64), 0.3),
        torch.full((2, 64), 1e-9),
        torch.tensor([[1e4] + [1e-3] * 63, [-1e-8, 1e-8] * 32]),
        torch.linspace(-1, 1, 64)[:, None],
    ],
    ids=["zeros", "constant", "below float16", "outlier and tiny", "one column"],
)
def test_the_kernel_and_the_reference_agree_on_degenerate_groups(weight, bits, reference):
    options = {"bits": bits, "group_size": 64, "search": "mse"}
    quantized, residual = INT.quantize(weight, weight, **options)
    other, expected = reference(weight, weight, **options)
    values, others = INT.dequantize(quantized), INT.dequantize(other)
    torch.testing.assert_close(values, others, rtol=2.0**-10, atol=1e-12)
    torch.testing.assert_close(residual, weight - values, rtol=0, atol=1e-7)
    torch.testing.assert_close(expected, weight - others, rtol=0, atol=1e-7)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.parametrize("bits", BITS)
def test_the_number_of_threads_changes_no_bit(bits):
    target, weight = heavy_tailed(101, 192), heavy_tailed(101, 192, seed=1)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)  # the kernel follows it
            results.append(INT.quantize(target, weight, bits=bits, group_size=64, search="mse"))
    finally:
        torch.set_num_threads(before)
    (one, residual), (two, other_residual) = results
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)
    assert torch.equal(one.zeros, two.zeros)
    assert torch.equal(residual, other_residual)


def test_a_row_s_result_does_not_depend_on_the_other_rows():
    weight = heavy_tailed(9, 192)
    together, _ = INT.quantize(weight, weight, bits=2, group_size=64, search="mse")
    alone, _ = INT.quantize(weight[4:5], weight[4:5], bits=2, group_size=64, search="mse")
    assert torch.equal(together.codes[4:5], alone.codes)
    assert torch.equal(together.scales[4:5], alone.scales)


@pytest.mark.parametrize("exponent", range(-24, 15))
def test_scales_are_rounded_to_float16_as_torch_does(exponent):
    mantissas = torch.linspace(1.0, 2.0, 257)[:-1]
    values = (mantissas * 2.0**exponent).tolist()
    rounded = [float(kernels.to_f16(np.float32(value))) for value in values]
    assert rounded == torch.tensor(values).half().float().tolist()


@pytest.mark.parametrize("value", [65519.0, 65520.0, 1e6, 3e38])
def test_scales_beyond_float16_become_its_largest_number(value):
    assert float(kernels.to_f16(np.float32(value))) == 65504.0
