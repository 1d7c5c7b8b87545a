import pytest

from qinit.words import duration, moment, parse_size


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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("300mb", 300 * 10**6),
        (" 2 GiB ", 2 << 30),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("7MiB", 7 << 20),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1.5GB", "-1GB", "0MB", "5", "²GB", "5TBGB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="expected a size like 5GB"):
        parse_size(text)
