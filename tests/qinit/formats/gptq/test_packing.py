import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qinit.formats.gptq.packing import pack_rows, unpack_rows

WIDTHS = (2, 3, 4, 8)


def stream_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """The definition, bit by bit: the lowest bit of the first value comes first, 32 bits make a word."""
    bit = (codes[..., None] >> np.arange(bits)) & 1
    words = bit.reshape(codes.shape[0], -1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
    return words.sum(-1).astype(np.uint32).view(np.int32)


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from(WIDTHS))
    shape = (draw(st.integers(1, 4)), 32 * draw(st.integers(1, 4)))
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))), bits


@given(codes_and_bits())
@settings(max_examples=60, deadline=None)
def test_unpacking_undoes_packing(case):
    codes, bits = case
    packed = pack_rows(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (codes.shape[0], codes.shape[1] * bits // 32)
    assert torch.equal(unpack_rows(packed, bits), torch.from_numpy(codes))


@given(codes_and_bits())
@settings(max_examples=60, deadline=None)
def test_packing_is_a_little_endian_bit_stream(case):
    codes, bits = case
    assert np.array_equal(pack_rows(torch.from_numpy(codes), bits).numpy(), stream_bits(codes, bits))


def test_three_bit_values_cross_words_as_computed_by_hand():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0] = 5  # bits 0 to 2 of word 0
    codes[0, 10] = 0b110  # bits 30 and 31 of word 0 (1, 0 from below) and bit 0 of word 1
    codes[0, 21] = 0b101  # bit 31 of word 1 and bits 0 and 1 of word 2
    codes[0, 31] = 7  # the last three bits of word 2
    word_0 = 5 | (0b10 << 30)
    word_1 = 1 | (1 << 31)
    word_2 = 0b10 | (7 << 29)
    expected = np.array([[word_0, word_1, word_2]], dtype=np.uint32).view(np.int32)
    assert np.array_equal(pack_rows(codes, 3).numpy(), expected)


def test_a_four_bit_word_holds_its_values_from_the_lowest_nibble_up():
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).reshape(1, 32)
    words = pack_rows(codes, 4).numpy().view(np.uint32)[0]
    assert [hex(word) for word in words] == ["0x76543210", "0xfedcba98", "0x76543210", "0xfedcba98"]


def test_rows_longer_than_a_chunk_pack_as_single_rows_do():
    codes = torch.randint(0, 8, (9, 1 << 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = pack_rows(codes, 3)  # 9 rows of 65536 values make three chunks
    assert torch.equal(together, torch.cat([pack_rows(row[None], 3) for row in codes]))


@pytest.mark.parametrize("count", [1, 31, 33])
def test_a_count_that_fills_no_words_is_refused(count):
    with pytest.raises(ValueError, match=f"cannot pack {count} values"):
        pack_rows(torch.zeros(1, count, dtype=torch.uint8), 2)
