import pytest

from qinit.processes.deal import deal, rounds


@pytest.mark.parametrize(
    ("sizes", "count", "owners"),
    [
        ([4, 2, 2], 1, [0, 0, 0]),
        ([4, 2, 2], 2, [0, 1, 1]),
        ([1, 8, 4, 4], 2, [0, 0, 1, 1]),
        ([5, 5], 3, [0, 1]),
        ([], 3, []),
    ],
)
def test_the_largest_goes_first_to_who_has_the_least(sizes, count, owners):
    assert deal(sizes, count) == owners


def test_rounds_hold_every_piece_once_and_about_as_much_for_each():
    sizes = [8, 8, 4, 4, 4, 4, 1, 1, 1]
    owners = deal(sizes, 2)
    found = rounds(sizes, owners, 2, 8)
    assert sorted(piece for some in found for piece in some) == list(range(9))
    for some in found[:-1]:
        assert all(8 <= sum(sizes[piece] for piece in some if owners[piece] == owner) < 16 for owner in range(2))
    assert rounds([], [], 2, 8) == []
