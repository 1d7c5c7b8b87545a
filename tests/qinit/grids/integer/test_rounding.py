from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinit.grids import GRIDS
from qinit.grids.integer.rounding import column_blocks, descend, round_gptq
from qinit.linalg.hessian import damped_cholesky
from tests.helpers import gauss
from tests.layers import correlated

INT = GRIDS["int"]
BITS = (2, 3, 4, 8)
# rows, columns, group size: several blocks, a short last group, a group wider than a block, one wider than the matrix
SHAPES = [(24, 320, 64), (24, 200, 64), (16, 300, 192), (16, 40, 64), (17, 33, 8)]


def error(residual: torch.Tensor, hessian: torch.Tensor) -> float:
    residual, hessian = residual.double(), hessian.double()
    return float(((residual @ hessian) * residual).sum())


def rest(target: torch.Tensor, quantized) -> torch.Tensor:
    return target - INT.dequantize(quantized)


def textbook_gptq(weight, hessian, given, order, damp):
    """GPTQ (arXiv:2210.17323, algorithm 1) in float64 with the scales and zero points of `given`; columns are taken by
    `order`. Returns the codes and their values."""
    weight, hessian = weight.double()[:, order], hessian.double()[order][:, order]
    columns, group = len(order), order // given.group_size
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    codes, values = torch.empty_like(weight), torch.empty_like(weight)
    for i in range(columns):
        scale, zero = given.scales[:, group[i]].double(), given.zeros[:, group[i]].double()
        codes[:, i] = (torch.floor(weight[:, i] / scale + 0.5) + zero).clamp(0, 2**given.bits - 1)
        values[:, i] = scale * (codes[:, i] - zero)
        wrong = (weight[:, i] - values[:, i]) / inverse[i, i]
        weight[:, i:] -= wrong[:, None] * inverse[i, i:]
    back = torch.argsort(order)
    return codes[:, back], values[:, back]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_rounding_is_textbook_gptq(rows, columns, group_size, bits, search, act_order):
    target, hessian = gauss(rows, columns, scale=0.02), correlated(columns)
    options = {"bits": bits, "group_size": group_size, "search": search, "act_order": act_order}
    quantized, residual = round_gptq(target, hessian, damp=0.02, **options)
    order = torch.argsort(hessian.diagonal()).flip(0) if act_order else torch.arange(columns).flip(0)
    codes, values = textbook_gptq(target, hessian, quantized, order, 0.02)
    # A float32 last bit that turns one code is fed back to the rest of its row.
    assert (quantized.codes.double() == codes).all(1).float().mean() >= 0.8
    assert error(residual, hessian) == pytest.approx(error(target - values, hessian), rel=0.03)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_first_group_s_min_max_scale_is_that_of_the_weights(act_order):
    target, hessian = gauss(16, 96, scale=0.02), correlated(96)
    options = {"bits": 3, "group_size": 32, "search": "minmax"}
    quantized, _ = round_gptq(target, hessian, act_order=act_order, **options)
    nearest, _ = INT.quantize(target, target, **options)
    groups = slice(0, 3) if act_order else slice(2, 3)  # known beforehand, or the last one, which nothing is fed to
    assert torch.equal(quantized.scales[:, groups], nearest.scales[:, groups])
    assert torch.equal(quantized.zeros[:, groups], nearest.zeros[:, groups])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_residual_is_what_the_codes_leave(rows, columns, group_size, bits, search, act_order):
    target, hessian = gauss(rows, columns, scale=0.02), correlated(columns)
    kept, kept_hessian = target.clone(), hessian.clone()
    quantized, residual = round_gptq(
        target, hessian, bits=bits, group_size=group_size, search=search, act_order=act_order
    )
    assert torch.equal(target, kept)  # all columns in one block: the feedback must not write into it
    assert torch.equal(hessian, kept_hessian)
    torch.testing.assert_close(residual, rest(target, quantized), rtol=0, atol=1e-7)
    assert quantized.codes.shape == target.shape
    assert quantized.scales.shape == quantized.zeros.shape == (rows, -(-columns // group_size))
    assert int(quantized.codes.max()) < 2**bits
    assert int(quantized.zeros.max()) < 2**bits
    assert (quantized.scales > 0).all()
    assert torch.equal(quantized.scales, quantized.scales.half().float())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", BITS)
def test_on_correlated_inputs_the_error_is_below_that_of_nearest_rounding(bits, search, act_order):
    target, hessian = gauss(48, 256, scale=0.02), correlated(256)
    options = {"bits": bits, "group_size": 64, "search": search}
    _, nearest = INT.quantize(target, target, **options)
    _, residual = round_gptq(target, hessian, act_order=act_order, **options)
    assert error(residual, hessian) < 0.7 * error(nearest, hessian)


def test_without_correlation_there_is_nothing_to_feed_back():
    target = gauss(16, 128, scale=0.02)
    options = {"bits": 3, "group_size": 32, "search": "minmax"}
    quantized, _ = round_gptq(target, torch.eye(128), **options)
    nearest, _ = INT.quantize(target, target, **options)
    assert torch.equal(quantized.codes, nearest.codes)
    assert torch.equal(quantized.scales, nearest.scales)


def test_act_order_takes_the_largest_inputs_first():
    """Nothing is fed back to the column that is taken first: it is rounded to nearest."""
    target, hessian = gauss(64, 96, scale=0.02), correlated(96)
    hessian *= torch.linspace(1, 3, 96).roll(40)[:, None] * torch.linspace(1, 3, 96).roll(40)
    first = int(hessian.diagonal().argmax())
    assert first not in (0, 95)
    options = {"bits": 3, "group_size": 32, "search": "mse"}
    quantized, residual = round_gptq(target, hessian, act_order=True, **options)
    group = first // 32
    scale, zero = quantized.scales[:, group], quantized.zeros[:, group].float()
    nearest = (torch.floor(target[:, first] / scale + 0.5) + zero).clamp(0, 7)
    assert torch.equal(quantized.codes[:, first].float(), nearest)
    _, plain = round_gptq(target, hessian, **options)
    assert residual[:, first].norm() < plain[:, first].norm()


@pytest.mark.parametrize("act_order", [False, True])
def test_rounding_finds_its_scales_for_the_inputs_that_matter(act_order):
    target, sizes = gauss(32, 32, scale=0.02), torch.full((32,), 1e-4)
    sizes[5::8] = 4.0
    options = {"bits": 3, "group_size": 8, "search": "mse", "act_order": act_order}
    _, residual = round_gptq(target, torch.diag(sizes), damp=1e-5, **options)
    assert residual[:, 5::8].abs().mean() < 0.02 * residual.abs().mean()


def test_blocks_are_whole_groups():
    for columns, group_size in ((512, 64), (300, 96), (300, 192), (40, 64), (128, 128), (130, 8)):
        blocks = column_blocks(columns, group_size)
        assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
        assert blocks[-1].stop == columns
        assert all(b.start % group_size == 0 for b in blocks)
        assert all(b.stop - b.start <= max(128, group_size) for b in blocks)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("search", ["mse", "minmax"])
class TestDegenerate:
    options = {"bits": 3, "group_size": 32}  # noqa: RUF012

    def test_without_any_input_rounding_is_to_nearest(self, search, act_order):
        target = gauss(8, 96, scale=0.02)
        _, residual = round_gptq(target, torch.zeros(96, 96), search=search, act_order=act_order, **self.options)
        assert torch.isfinite(residual).all()
        _, nearest = INT.quantize(target, target, search=search, **self.options)
        assert residual.norm() < 1.2 * nearest.norm()
        assert residual.norm() < 0.3 * target.norm()

    def test_inputs_that_are_always_zero(self, search, act_order):
        target, hessian = gauss(8, 96, scale=0.02), correlated(96)
        hessian[10:50] = 0
        hessian[:, 10:50] = 0  # a whole group among them
        quantized, residual = round_gptq(target, hessian, search=search, act_order=act_order, **self.options)
        torch.testing.assert_close(residual, rest(target, quantized), rtol=0, atol=1e-7)
        before = error(residual, hessian)
        descend(quantized, residual, hessian)
        assert torch.isfinite(residual).all()
        assert error(residual, hessian) <= before

    def test_zero_and_constant_weights(self, search, act_order):
        hessian = correlated(96)
        for value in (0.0, 0.3, -0.3):
            target = torch.full((4, 96), value)
            quantized, residual = round_gptq(target, hessian, search=search, act_order=act_order, **self.options)
            descend(quantized, residual, hessian)
            assert float(residual.abs().max()) <= 2.0**-11 * abs(value) * 1.01
            assert torch.isfinite(quantized.scales).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 150),
    group_size=st.sampled_from([8, 32, 64, 160]),
    tokens=st.sampled_from([1, 7, 400]),
    start=st.sampled_from(["nearest", "gptq", "random"]),
    size=st.sampled_from([1.0, 1e-3, 100.0]),
    passes=st.integers(1, 3),
)
def test_a_sweep_never_raises_the_error(seed, bits, rows, columns, group_size, tokens, start, size, passes):
    target, hessian = size * gauss(rows, columns, seed=seed, scale=0.02), correlated(columns, tokens, seed)
    options = {"bits": bits, "group_size": group_size, "search": "mse"}
    if start == "gptq":
        quantized, residual = round_gptq(target, hessian, **options)
    else:
        quantized, residual = INT.quantize(target, target, **options)
    if start == "random":
        generator = torch.Generator().manual_seed(seed)
        quantized.codes.copy_(torch.randint(0, 2**bits, quantized.codes.shape, generator=generator))
        residual = rest(target, quantized)
    largest = float(residual.abs().max())  # what the sweeps take off it leaves float32's rounding behind
    errors = [error(residual, hessian)]
    for _ in range(3):
        descend(quantized, residual, hessian, passes)
        errors.append(error(residual, hessian))
    slack = 1e-6 * error(target, hessian) + 1e-11 * errors[0]  # float32, of the target and of a wild start
    assert all(later <= earlier * (1 + 1e-4) + slack for earlier, later in pairwise(errors))
    torch.testing.assert_close(residual, rest(target, quantized), rtol=0, atol=1e-5 * max(largest, 2 * 0.02 * size))
    assert torch.equal(quantized.scales, quantized.scales.half().float())
    assert (quantized.scales > 0).all()
    assert int(quantized.codes.max()) < 2**bits


@pytest.mark.parametrize("act_order", [False, True])
def test_a_factor_at_hand_changes_nothing(act_order):
    target, hessian = gauss(16, 160, scale=0.02), correlated(160)
    options = {"bits": 2, "group_size": 32, "search": "mse", "damp": 0.1, "act_order": act_order}
    given, given_residual = round_gptq(target, hessian, factor=damped_cholesky(hessian, 0.1), **options)
    found, residual = round_gptq(target, hessian, **options)
    assert torch.equal(given.codes, found.codes)
    assert torch.equal(given.scales, found.scales)
    assert torch.equal(given_residual, residual)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_sweeps_lower_the_error_further_than_rounding_does(bits, start):
    target, hessian = gauss(32, 192, scale=0.02), correlated(192)
    options = {"bits": bits, "group_size": 64, "search": "mse"}
    found = round_gptq(target, hessian, **options) if start == "gptq" else INT.quantize(target, target, **options)
    quantized, residual = found
    before = error(residual, hessian)
    descend(quantized, residual, hessian)
    assert error(residual, hessian) < (0.97 if start == "gptq" else 0.6) * before
    for _ in range(30):
        descend(quantized, residual, hessian)
    settled = error(residual, hessian)
    codes = quantized.codes.clone()
    descend(quantized, residual, hessian)
    assert error(residual, hessian) == pytest.approx(settled, rel=1e-4)
    # No single code could be better: each one lies at the minimum along its own axis.
    scale = quantized.scales.repeat_interleave(64, 1)
    wanted = (residual.double() @ hessian.double()) / (scale * hessian.diagonal())
    best = (codes + wanted).clamp(0, 2**bits - 1)
    assert ((best - codes).abs() < 0.51).float().mean() > 0.99
