import pytest
import torch

from qinit.exports.mlx.layers import biases_of, encode, group_size
from qinit.formats.gptq.packing import pack_rows, unpack_rows
from tests.qinit.exports.gguf.test_blocks import grid_of


@pytest.mark.parametrize(("bits", "zeros"), [(2, range(4)), (3, range(8)), (4, [7, 8, 0, 11])])
def test_a_layer_comes_back_to_the_last_bit(bits, zeros):
    grid = grid_of(bits, list(zeros))
    assert biases_of(grid).rounded == 0
    words, scales, biases = encode(grid, pack_rows(grid.codes, bits).T.contiguous())
    codes = unpack_rows(words.view(torch.int32), bits).float()
    found = scales.float().repeat_interleave(64, 1) * codes + biases.float().repeat_interleave(64, 1)
    expected = grid.scales.repeat_interleave(64, 1) * (grid.codes.float() - grid.zeros.float().repeat_interleave(64, 1))
    assert torch.equal(found, expected)


def test_biases_that_are_rounded_are_counted():
    found = biases_of(grid_of(4, [5, 6, 9, 10]))
    assert found.rounded > 0
    assert 0 < found.worst < 0.01
    assert group_size(2, 16, 128) is None
