import pytest

from qinit.processes.launch import count, number, rank, speaks


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (1, 0, True)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (1, 0, True)),
        ({"RANK": "3"}, (1, 0, True)),  # of something else
        ({"WORLD_SIZE": "4", "RANK": "0"}, (4, 0, True)),
        ({"WORLD_SIZE": "4", "RANK": "3"}, (4, 3, False)),
        ({"WORLD_SIZE": "many"}, (1, 0, True)),
    ],
)
def test_it_is_read_from_the_environment(variables, expected, monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (count(), rank(), speaks()) == expected


def test_a_number_that_is_not_set_is_another(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert number("LOCAL_RANK", 5) == 5
