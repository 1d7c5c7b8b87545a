from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinit.exports.symmetric import half, other_zeros, symmetric
from qinit.grids import GRIDS, Quantized


def a_grid(bits, group_size, columns, seed):
    random = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (5, columns), generator=random, dtype=torch.uint8)
    zeros = half(bits) - torch.randint(0, 2, (5, groups), generator=random, dtype=torch.uint8)
    scales = torch.rand(5, groups, generator=random).half().float()
    return Quantized(bits, group_size, codes, scales, zeros)


@given(st.sampled_from((2, 3, 4, 8)), st.sampled_from((3, 16, 64)), st.integers(1, 130), st.integers(0, 2**32))
def test_the_same_values_with_the_zero_point_in_the_middle(bits, group_size, columns, seed):
    given = a_grid(bits, group_size, columns, seed)
    kept = given.codes.clone()
    found = symmetric(given)
    assert torch.equal(GRIDS["int"].dequantize(found), GRIDS["int"].dequantize(given))
    assert torch.equal(given.codes, kept)
    assert bool((found.zeros == half(bits)).all())
    assert torch.equal(found.scales < 0, (given.zeros == half(bits) - 1) & (given.scales > 0))
    again = symmetric(found)
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.scales, found.scales)


def test_other_zero_points_are_counted():
    given = a_grid(2, 16, 64, 0)
    zeros = given.zeros.clone()
    zeros[0, 1], zeros[3, 2] = 0, 3
    assert other_zeros(zeros, 2) == 2
    with pytest.raises(ValueError, match="2 of 20 groups have a zero point other than 1 or 2"):
        symmetric(replace(given, zeros=zeros))
    with pytest.raises(ValueError, match="without zero points"):
        symmetric(replace(given, zeros=None))
