import pytest
import torch

from qinit.linalg.chunks import ROW_CHUNK_ELEMENTS as SIZES
from qinit.linalg.chunks import grouped, row_chunks

ROW_CHUNK_ELEMENTS = SIZES["cpu"]


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (1, 3 * ROW_CHUNK_ELEMENTS), (10, ROW_CHUNK_ELEMENTS // 3), (5000, 64), (7, ROW_CHUNK_ELEMENTS)],
)
def test_row_chunks_cover_every_row_once_and_stay_small(rows, columns):
    chunks = list(row_chunks(rows, columns))
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))
    for chunk in chunks:
        count = chunk.stop - chunk.start
        assert count == 1 or count * columns <= ROW_CHUNK_ELEMENTS


def test_groups_run_along_the_inputs_and_the_last_is_filled_with_zeros():
    weight = torch.arange(10.0).reshape(2, 5)
    expected = torch.tensor([[[0, 1], [2, 3], [4, 0]], [[5, 6], [7, 8], [9, 0]]], dtype=torch.float32)
    assert torch.equal(grouped(weight, 2), expected)
    assert grouped(weight, 5).shape == (2, 1, 5)
    assert grouped(weight, 8).shape == (2, 1, 8)
