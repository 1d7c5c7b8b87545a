import pytest
import torch

from qinit.errors import QinitError
from qinit.evaluate.windows import cut_windows

TOKENS = torch.arange(100, 123)  # a token says where it stands


def predicted(windows):
    """Each predicted token, with how many tokens of its window stand before it."""
    pairs = zip(windows.tokens.tolist(), windows.first.tolist(), strict=True)
    return [(token, at) for row, first in pairs for at, token in enumerate(row) if at >= first]


def test_windows_do_not_overlap_and_the_rest_is_left_out():
    windows = cut_windows(TOKENS, 5)
    assert windows.tokens.tolist() == [list(range(100 + 5 * i, 105 + 5 * i)) for i in range(4)]
    assert windows.stride is None
    assert windows.predicted == 16 == len(predicted(windows))
    assert {at for _, at in predicted(windows)} == {1, 2, 3, 4}


@pytest.mark.parametrize("count", [5, 6, 13, 23])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_with_a_stride_each_token_but_the_first_is_predicted_once_with_enough_before_it(stride, count):
    windows = cut_windows(TOKENS[:count], 5, stride)
    found = predicted(windows)
    assert [token for token, _ in found] == TOKENS[1:count].tolist()
    assert all(at >= 5 - stride for token, at in found if token >= 105)
    assert [at for _, at in found[:4]] == [1, 2, 3, 4]
    assert windows.predicted == count - 1


def test_a_limit_takes_the_first_windows():
    assert cut_windows(TOKENS, 5, limit=2).tokens.tolist() == cut_windows(TOKENS[:10], 5).tokens.tolist()
    some = cut_windows(TOKENS, 5, 2, limit=3)
    assert (len(some), some.predicted) == (3, 8)
    assert len(cut_windows(TOKENS, 5, limit=99)) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((24,), "the text has 23 tokens, fewer than one window of 24"),
        ((1,), "length: expected 2 tokens or more, found 1"),
        ((5, 5), "stride: expected 1 to 4, less than the length of a window, found 5"),
        ((5, 0), "stride: expected 1 to 4"),
        ((5, None, 0), "windows: expected 1 or more, found 0"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, said):
    with pytest.raises(QinitError, match=said):
        cut_windows(TOKENS, *arguments)
