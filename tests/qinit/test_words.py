import pytest

from qinit.words import duration, moment


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.01, "1 s"),
        (59, "59 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (3600, "60 min"),
        (9000, "2.5 h"),
        (1e6, "12 days"),
    ],
)
def test_durations_are_said_in_one_unit(seconds, expected):
    assert duration(seconds) == expected


def test_a_moment_that_is_none_is_shown_as_it_is():
    assert moment("yesterday") == "yesterday"
    assert len(moment("2026-01-02T03:04:05+00:00")) == 16
