"""The search that CUDA runs; on the CPU it is the kernel's reference, and held against it in test_search_cpu.py."""

import numpy as np
import pytest
import torch

from qinit.grids.integer.candidates import REFINEMENTS, clip_ratios, zero_points
from qinit.grids.integer.search_torch import fit_groups, quantize_torch
from qinit.linalg import chunks
from tests.qinit.grids.integer.test_grid import least_error, of_kind


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "one-sided", "shifted"])
@pytest.mark.parametrize("bits", [2, 3])
def test_groups_are_fitted_close_to_the_exact_optimum(kind, bits):
    x = of_kind(kind, 24, 32, seed=bits)
    codes, zeros, scales = fit_groups(
        x, 2**bits - 1, clip_ratios(bits).tolist(), REFINEMENTS, None, zero_points(bits, False)
    )
    found = (x - codes * scales[:, None]).double().square().sum(1).numpy()
    least = np.array([least_error(group.double().numpy(), bits) for group in x])
    assert (found >= least * (1 - 1e-4)).all()
    assert found.sum() <= 1.02 * least.sum()
    assert ((codes >= -zeros[:, None]) & (codes <= 2**bits - 1 - zeros[:, None])).all()


def test_one_ratio_is_the_min_max_scale():
    x = torch.tensor([[-0.3, 0.9, 0.1, 0.6], [0.2, 0.5, 0.8, 0.1]])
    codes, zeros, scales = fit_groups(x, 3, [1.0], 0, None, (0, 3))
    torch.testing.assert_close(scales, torch.tensor([0.4, 0.8 / 3]).half().float())
    assert zeros.tolist() == [1, 0]  # a range without zero is stretched to it
    assert (codes + zeros[:, None]).tolist() == [[0, 3, 1, 3], [1, 2, 3, 0]]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_start_is_kept_where_it_is_the_best_and_left_where_it_is_not(bits):
    x = of_kind("normal", 8, 64)
    levels, ratios = 2**bits - 1, clip_ratios(bits).tolist()
    codes, zeros, scales = fit_groups(x, levels, ratios, REFINEMENTS, None, (0, levels))
    least = float((x - codes * scales[:, None]).norm())
    for start, tried in ((scales, [0.95, 1.0, 1.06]), (1.1 * scales, [0.88, 0.95, 1.0])):
        codes, again, found = fit_groups(x, levels, tried, REFINEMENTS, (start, zeros), (0, levels))
        assert float((x - codes * found[:, None]).norm()) <= 1.01 * least
        assert ((again - zeros).abs() <= 1).all()
    assert not torch.equal(found, start)


def test_rows_in_chunks_are_the_rows_alone(monkeypatch):
    weight = of_kind("heavy-tailed", 7, 100)
    arguments = (2, 32, clip_ratios(2), REFINEMENTS, None, (0, 3))
    quantized, residual = quantize_torch(weight, weight, *arguments)
    monkeypatch.setitem(chunks.ROW_CHUNK_ELEMENTS, "cpu", 200)
    pieces, rest = quantize_torch(weight, weight, *arguments)
    assert torch.equal(pieces.codes, quantized.codes)
    assert torch.equal(pieces.scales, quantized.scales)
    assert torch.equal(rest, residual)
