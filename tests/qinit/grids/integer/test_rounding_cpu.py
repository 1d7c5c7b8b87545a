import numba
import pytest
import torch

from qinit.grids import GRIDS
from qinit.grids.integer import kernels, rounding
from qinit.grids.integer.rounding import descend, round_gptq
from tests.helpers import gauss
from tests.layers import correlated
from tests.qinit.grids.integer.test_rounding import BITS, SHAPES, error

INT = GRIDS["int"]


@pytest.fixture
def reference(monkeypatch):
    """The same call through plain torch: whatever goes to the kernels goes to the reference steps."""

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(rounding, "kernels_for", lambda _: kernels._of_torch())
            return function(*arguments, **options)

    return call


def assert_alike(found, expected, hessian):
    (quantized, residual), (other, other_residual) = found, expected
    # Sums in another order turn a code now and then, and the feedback carries it through the rest of its row; rows
    # in which nothing has turned are the same to the last float16. (A group of one weight has many zero points that
    # are equally good, and which one is taken depends on the processor.)
    assert (quantized.codes == other.codes).float().mean() >= (0.85 if quantized.bits == 8 else 0.98)
    same = (quantized.codes == other.codes).all(1) & (quantized.zeros == other.zeros).all(1)
    assert same.any()
    torch.testing.assert_close(quantized.scales[same], other.scales[same], rtol=2.0**-10, atol=0)
    torch.testing.assert_close(residual[same], other_residual[same], rtol=0, atol=2e-4)
    assert error(residual, hessian) == pytest.approx(error(other_residual, hessian), rel=0.05)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_kernel_feeds_back_as_the_torch_steps_do(rows, columns, group_size, bits, search, act_order, reference):
    target, hessian = gauss(rows, columns, scale=0.02), correlated(columns)
    options = {"bits": bits, "group_size": group_size, "search": search, "act_order": act_order}
    found = round_gptq(target, hessian, **options)
    assert_alike(found, reference(round_gptq, target, hessian, **options), hessian)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_kernel_descends_as_the_torch_steps_do(rows, columns, group_size, bits, passes, reference):
    target, hessian = gauss(rows, columns, scale=0.02), correlated(columns)
    hessian[3] = hessian[:, 3] = 0  # an input that is never seen
    options = {"bits": bits, "group_size": group_size, "search": "mse"}
    found, expected = INT.quantize(target, target, **options), INT.quantize(target, target, **options)
    for _ in range(2):
        descend(*found, hessian, passes)
        reference(descend, *expected, hessian, passes)
    assert_alike(found, expected, hessian)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.parametrize("bits", BITS)
def test_the_number_of_threads_changes_no_bit(bits):
    """The kernels' threads; torch's own products may differ in the last bit with theirs."""
    target, hessian = gauss(101, 96, scale=0.02), correlated(96)
    start, start_residual = INT.quantize(target, target, bits=bits, group_size=32, search="mse")
    gradient = start_residual @ hessian
    feedback = torch.linalg.cholesky(hessian)
    feedback /= feedback.diagonal().clone()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)  # the kernels follow it
            quantized = rounding._empty(target, bits, 32)
            residual, moved = torch.empty_like(target), target.clone()
            ratios = rounding.clip_ratios(bits)
            block = rounding.Block(slice(0, 96), 2**bits - 1, 32, ratios, rounding.REFINEMENTS, (0, 2**bits - 1))
            found = rounding.kernels_for(target.device)
            feed, sweep = found.feed_back_block, found.descend_block
            feed(block, quantized, target, moved, residual, feedback, torch.ones(96), torch.arange(96) // 32)
            swept = rounding.replace(start, codes=start.codes.clone(), scales=start.scales.clone())
            swept_residual = start_residual.clone()
            sweep(block, swept, gradient.clone(), swept_residual, hessian, 2)
            results.append((quantized.codes, quantized.scales, quantized.zeros, residual))
            results[-1] += (swept.codes, swept.scales, swept_residual)
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_row_s_result_does_not_depend_on_the_other_rows():
    target, hessian = gauss(9, 128, scale=0.02), correlated(128)
    options = {"bits": 2, "group_size": 64, "search": "mse"}
    together, _ = round_gptq(target, hessian, **options)
    alone, _ = round_gptq(target[4:5], hessian, **options)
    assert torch.equal(together.codes[4:5], alone.codes)
    assert torch.equal(together.scales[4:5], alone.scales)


def test_the_same_call_gives_the_same_bits():
    target, hessian = gauss(32, 192, scale=0.02), correlated(192)
    options = {"bits": 2, "group_size": 64, "search": "mse"}
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        quantized, residual = round_gptq(target, hessian, **options)
        descend(quantized, residual, hessian)
        runs.append((quantized.codes, quantized.scales, residual))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
