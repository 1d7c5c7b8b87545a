import pytest
import torch

from qinit.exports.gguf.blocks import BLOCK_TYPES, smallest
from qinit.formats.gptq.packing import pack_rows
from qinit.grids import Quantized

WIDTH = 128


def grid_of(bits, zeros, group_size=64):
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (4, WIDTH), generator=random, dtype=torch.uint8)
    shape = (4, WIDTH // group_size)
    chosen = torch.tensor(zeros, dtype=torch.uint8)[torch.randint(len(zeros), shape, generator=random)]
    return Quantized(bits, group_size, codes, torch.randn(shape, generator=random).half().float(), chosen)


def decoded(kind, raw):
    """What llama.cpp makes of the bytes: by its own package, which is older than Q2_0."""
    gguf = pytest.importorskip("gguf")
    if kind != "Q2_0":
        return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]))
    blocks = raw.reshape(-1, 18)
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = (blocks[:, 2:, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3
    return (d * (codes.flatten(1).float() - 1)).reshape(len(raw), -1)


@pytest.mark.parametrize(
    ("bits", "zeros", "group_size", "kind"),
    [
        (2, [1, 2], 64, "Q2_0"),
        (2, [0, 1, 2, 3], 64, "Q4_0"),
        (2, [1, 2], 32, "Q4_0"),
        (3, list(range(8)), 64, "Q4_0"),
        (4, [7, 8], 32, "Q4_0"),
        (4, [7, 8, 11, 15], 64, "Q4_1"),
        (4, list(range(16)), 64, "Q5_0"),
        (8, [127, 128], 64, "Q8_0"),
    ],
)
def test_the_smallest_type_that_holds_every_value_to_the_last_bit(bits, zeros, group_size, kind):
    grid = grid_of(bits, zeros, group_size)
    found = smallest(grid, WIDTH)
    assert found.name == kind
    raw = found.encode(grid)
    assert raw.shape == (4, found.row_bytes(WIDTH))
    scales, points = (part.repeat_interleave(group_size, 1) for part in (grid.scales, grid.zeros.float()))
    assert torch.equal(decoded(kind, raw), scales * (grid.codes.float() - points))
    assert torch.equal(found.decode(raw), decoded(kind, raw))
    if found.stream == bits:
        assert torch.equal(found.encode_words(grid, pack_rows(grid.codes, bits).T.contiguous()), raw)


def test_what_no_type_holds():
    assert smallest(grid_of(8, [3]), WIDTH) is None
    assert smallest(grid_of(2, [1], group_size=16), WIDTH) is None
    assert [each.nbytes * 8 / each.size for each in BLOCK_TYPES] == [2.25, 4.5, 5, 5.5, 8.5]
