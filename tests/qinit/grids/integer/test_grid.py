import numpy as np
import pytest
import torch

from qinit.grids import GRIDS
from qinit.linalg.chunks import grouped

INT = GRIDS["int"]
BITS = (2, 3, 4, 8)
F16_MAX = 65504.0


def of_kind(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    size = (rows, columns)
    values = {
        "normal": lambda: random.normal(size=size),
        "heavy-tailed": lambda: random.standard_t(3, size=size),
        "one-sided": lambda: random.exponential(size=size),
        "shifted": lambda: random.normal(2.0, 1.0, size=size),
        "outlier": lambda: random.normal(size=size) + 100.0 * (np.arange(columns) == 5),
    }[kind]()
    return torch.from_numpy(0.02 * values).float()


def quantize(weight, bits=2, group_size=64, search="mse", previous=None):
    return INT.quantize(weight, weight, bits=bits, group_size=group_size, search=search, previous=previous)


def group_errors(residual: torch.Tensor, group_size: int) -> torch.Tensor:
    return grouped(residual, group_size).double().square().sum(-1)


def least_error(x: np.ndarray, bits: int) -> float:
    """The exact minimum over all scales and zero points of the squared error of one group.

    For a zero point, the codes change only where some x / s passes a half-integer. Between two such scales
    they are constant and the least-squares scale is best, so trying every interval finds the minimum.
    """
    levels = 2**bits - 1
    least = float(x @ x)
    for zero in range(levels + 1):
        halves = np.arange(-zero, levels - zero) + 0.5
        breaks = (x[:, None] / halves).ravel()
        breaks = np.sort(breaks[breaks > 0])
        if not len(breaks):
            continue
        scales = np.concatenate([breaks[:1] / 2, (breaks[1:] + breaks[:-1]) / 2, breaks[-1:] * 2])
        codes = np.clip(np.floor(x / scales[:, None] + 0.5), -zero, levels - zero)
        xc, cc = codes @ x, (codes * codes).sum(1)
        least = min(least, float(x @ x - (xc * xc / np.maximum(cc, 1)).max()))
    return least


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "one-sided", "shifted"])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_search_comes_close_to_the_exact_optimum(kind, bits):
    weight = of_kind(kind, 24, 64, seed=bits)
    _, residual = quantize(weight, bits=bits, group_size=32)
    found = group_errors(residual, 32).flatten().numpy()
    least = np.array([least_error(x.double().numpy(), bits) for x in grouped(weight, 32).flatten(0, 1)])
    assert (found >= least * (1 - 1e-4)).all()  # else the oracle is wrong
    assert found.sum() <= 1.02 * least.sum()
    assert np.mean(found / least) <= 1.02


def test_the_oracle_finds_the_optimum_of_a_dense_sweep():
    x = of_kind("heavy-tailed", 1, 16, seed=3)[0].double().numpy()
    sweep = np.inf
    for zero in range(4):
        scales = np.linspace(1e-4, 2 * np.abs(x).max(), 4000)
        codes = np.clip(np.floor(x / scales[:, None] + 0.5), -zero, 3 - zero)
        sweep = min(sweep, ((x - codes * scales[:, None]) ** 2).sum(1).min())
    assert least_error(x, 2) <= sweep
    assert least_error(x, 2) == pytest.approx(sweep, rel=1e-3)


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "one-sided", "shifted", "outlier"])
@pytest.mark.parametrize("bits", BITS)
def test_the_mse_search_is_never_worse_than_minmax(kind, bits):
    weight = of_kind(kind, 32, 256)
    _, searched = quantize(weight, bits=bits)
    _, plain = quantize(weight, bits=bits, search="minmax")
    # At 8 bits the scale's own rounding to float16 is worth some percent of a single group, for both.
    assert (group_errors(searched, 64) <= group_errors(plain, 64) * (1.15 if bits == 8 else 1.0001)).all()
    assert searched.norm() <= plain.norm()


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [64, 100, 40])  # whole groups, a short last one, less than one group
def test_codes_scales_zeros_and_residual_belong_together(bits, columns, search):
    weight = of_kind("heavy-tailed", 9, columns)
    quantized, residual = quantize(weight, bits=bits, search=search)
    assert quantized.zeros is not None
    assert int(quantized.codes.max()) < 2**bits
    assert int(quantized.zeros.max()) < 2**bits
    scale = quantized.scales.repeat_interleave(64, 1)[:, :columns]
    zero = quantized.zeros.float().repeat_interleave(64, 1)[:, :columns]
    expected = scale * (quantized.codes.float() - zero)
    assert torch.equal(INT.dequantize(quantized), expected)
    torch.testing.assert_close(residual, weight - expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_is_the_nearest_one(bits):
    weight = of_kind("heavy-tailed", 8, 128)
    quantized, residual = quantize(weight, bits=bits)
    scale = quantized.scales.repeat_interleave(64, 1)
    zero = quantized.zeros.float().repeat_interleave(64, 1)
    choices = scale[..., None] * (torch.arange(2**bits).float() - zero[..., None])
    nearest = (weight[..., None] - choices).abs().amin(-1)
    assert (residual.abs() <= nearest + 1e-5 * scale).all()


@pytest.mark.parametrize("size", [1e-9, 1e-8, 3e-7, 1e-5, 1.0, 1e4, 1e5, 3e7])
@pytest.mark.parametrize("bits", BITS)
def test_scales_are_float16_numbers_at_any_size_of_weight(size, bits):
    weight = of_kind("normal", 16, 128) / 0.02 * size
    quantized, residual = quantize(weight, bits=bits)
    assert torch.equal(quantized.scales.half().float(), quantized.scales)
    assert (quantized.scales > 0).all()
    assert quantized.scales.max() <= F16_MAX
    assert torch.isfinite(residual).all()
    assert (residual.abs() <= weight.abs() * (1 + 1e-6)).all()  # zero is always one of the values


def test_weights_below_the_least_float16_become_zero():
    quantized, residual = quantize(torch.full((2, 64), 1e-9))
    assert not INT.dequantize(quantized).any()
    assert torch.equal(residual, torch.full((2, 64), 1e-9))


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits, search):
    weight = torch.zeros(3, 100)
    weight[1, :64] = of_kind("normal", 1, 64)[0]  # beside a group that is not
    quantized, residual = quantize(weight, bits=bits, search=search)
    values = INT.dequantize(quantized)
    assert values[1, :64].any()
    values[1, :64] = 0
    assert not values.any()
    assert not residual[[0, 2]].any()


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.3, -0.7, 1e-3, -513.7])
def test_constant_groups_are_exact_but_for_the_scale_s_rounding(bits, value, search):
    quantized, residual = quantize(torch.full((2, 128), value), bits=bits, search=search)
    # Half a unit of a float16 scale of 11 bits; below 2^-14 its units are 2^-24, for each of up to 2^bits steps.
    assert residual.abs().max() <= max(abs(value) * 2.0**-11, 2**bits * 2.0**-25)
    assert len(INT.dequantize(quantized).unique()) == 1


@pytest.mark.parametrize("shape", [(1, 128), (128, 1), (1, 1), (1, 65)])
@pytest.mark.parametrize("bits", BITS)
def test_single_rows_and_columns(shape, bits):
    weight = of_kind("normal", *shape)
    quantized, residual = quantize(weight, bits=bits)
    assert quantized.codes.shape == residual.shape == shape
    assert residual.norm() <= 0.5 * weight.norm()


def test_one_huge_outlier_spoils_its_own_group_only():
    weight = of_kind("normal", 4, 256)
    _, clean = quantize(weight, bits=4)
    weight[2, 70] = 1000.0
    _, residual = quantize(weight, bits=4)
    spoiled = torch.zeros(4, 256, dtype=torch.bool)
    spoiled[2, 64:128] = True
    assert torch.equal(residual[~spoiled], clean[~spoiled])
    assert residual[2, 70].abs() <= 1.0  # the outlier itself is kept: clipping it would cost the most


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "one-sided", "shifted"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_warm_search_is_about_as_good_as_a_cold_one(bits, kind):
    weight = of_kind(kind, 32, 256)
    before, _ = quantize(weight, bits=bits)
    moved = weight + 0.1 * of_kind("normal", 32, 256, seed=9)
    _, warm = quantize(moved, bits=bits, previous=before)
    _, cold = quantize(moved, bits=bits)
    assert warm.norm() <= 1.02 * cold.norm()


def test_a_warm_search_does_not_write_to_the_previous_result():
    weight = of_kind("normal", 4, 128)
    before, _ = quantize(weight)
    kept = [before.codes.clone(), before.scales.clone(), before.zeros.clone()]
    quantize(1.3 * weight, previous=before)
    assert all(torch.equal(a, b) for a, b in zip(kept, (before.codes, before.scales, before.zeros), strict=True))


@pytest.mark.parametrize("view", ["transposed", "strided"])
def test_weights_that_are_not_contiguous_give_the_same(view):
    weight = of_kind("normal", 32, 64)
    other = weight.T.contiguous().T if view == "transposed" else torch.cat([weight, weight], 1)[:, :64]
    assert not other.is_contiguous()
    expected, quantized = quantize(weight)[0], quantize(other)[0]
    assert torch.equal(expected.codes, quantized.codes)
    assert torch.equal(expected.scales, quantized.scales)


@pytest.mark.parametrize("kind", ["normal", "one-sided", "shifted", "outlier"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("search", ["mse", "minmax"])
def test_the_symmetric_grid_searches_the_two_zero_points_in_the_middle(kind, bits, search):
    """Each group is at least as good as with either zero point and the scale that holds all of it."""
    weight = of_kind(kind, 9, 100, seed=bits)
    quantized, residual = GRIDS["sym"].quantize(weight, weight, bits=bits, group_size=32, search=search)
    half = 2 ** (bits - 1)
    assert set(quantized.zeros.unique().tolist()) <= {half - 1, half}
    torch.testing.assert_close(weight - INT.dequantize(quantized), residual, rtol=0, atol=1e-6)
    groups = grouped(weight, 32)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    widest = torch.maximum(-low / (half - 1), high / (half - 1))
    assert (group_errors(residual, 32) <= 32 * (0.51 * widest.double()) ** 2 + 1e-12).all()


def test_the_symmetric_grid_costs_little_where_groups_are_symmetric_and_much_where_not():
    for kind, most in (("normal", 1.001), ("one-sided", 4.0)):
        weight = of_kind(kind, 64, 256)
        errors = [
            GRIDS[name].quantize(weight, weight, bits=2, group_size=64, search="mse")[1].norm()
            for name in GRIDS
            if name in ("int", "sym")
        ]
        assert 1 <= errors[1] / errors[0] <= most
