import pytest

from qinit.plan.allocation import Option
from qinit.widths.knapsack import Choice, Item
from qinit.widths.prices import prices


def item(name, *choices):
    return Item((name,), 1000, (tuple(Choice(Option(*option), bits, 0, nats) for option, bits, nats in choices),))


ITEMS = [
    item("a", ((2, 64, 4), 8e6, 1.0), ((3, 64, 4), 16e6, 0.4), ((2, 32, 4), 9e6, 0.9), ((3, 32, 8), 18e6, 0.1)),
    item("b", ((2, 64, 4), 8e6, 1.0), ((3, 64, 4), 16e6, 0.8), ((2, 64, 8), 10e6, 0.75), ((2, 64, 2), 7e6, 2.0)),
]


def test_each_field_alone_in_the_layer_where_it_wins_most():
    """The room is 1 % of 16e6 bits, so that one step is taken for each."""
    assert prices(ITEMS, (0, 0)) == {
        "bits": pytest.approx(0.6),  # a megabyte for a's third bit
        "group_size": pytest.approx(0.1 * 8),
        "rank": pytest.approx(0.25 * 8 / 2),
    }


def test_what_is_already_the_largest_buys_nothing():
    assert prices(ITEMS, (1, 2)) == {"bits": 0.0, "group_size": 0.0, "rank": 0.0}
