import pytest
import torch

from qinit.grids import GRIDS
from qinit.grids.integer.candidates import LEAST_RATIO, NEARBY, clip_ratios


@pytest.mark.parametrize("bits", GRIDS["int"].bits)
def test_every_width_has_ratios_up_to_the_whole_range(bits):
    ratios = clip_ratios(bits)
    assert float(ratios[-1]) == 1.0  # so that the search is never worse than min-max
    assert float(ratios[0]) == pytest.approx(LEAST_RATIO[bits])
    assert (ratios.diff() > 0).all()


def test_the_fewer_levels_the_more_of_the_range_may_be_clipped():
    least = [LEAST_RATIO[bits] for bits in sorted(LEAST_RATIO)]
    assert least == sorted(least)


def test_what_was_found_before_is_tried_again():
    assert 1.0 in NEARBY
    assert torch.tensor(NEARBY).diff().gt(0).all()
