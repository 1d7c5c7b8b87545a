import torch

from qinit.exports.flip import flipped
from qinit.grids import Quantized


def test_a_flipped_group_has_the_same_values():
    random = torch.Generator().manual_seed(0)
    codes, zeros = (torch.randint(8, shape, generator=random, dtype=torch.uint8) for shape in ((5, 96), (5, 2)))
    grid = Quantized(3, 64, codes, torch.randn(5, 2, generator=random), zeros)
    groups = torch.rand(5, 2, generator=random) > 0.5

    def values(each):
        scales, zeros = (part.repeat_interleave(64, 1)[:, :96] for part in (each.scales, each.zeros.int()))
        return scales * (each.codes.int() - zeros)

    found = flipped(grid, groups)
    assert torch.equal(values(found), values(grid))
    assert torch.equal(found.scales != grid.scales, groups)
