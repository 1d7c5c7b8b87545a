"""Fixtures of tests of several commands."""

import shutil
import sys
from pathlib import Path

import pytest

from qinit.planner.auto import choose
from tests.compared import STARTS, TEXT, TRAINING, TUNING
from tests.models import words


@pytest.fixture
def auto(command, monkeypatch):
    """Let `auto` choose as it does for users; the machine is always fast and empty."""
    monkeypatch.setattr("qinit.planner.make.choose", choose)
    monkeypatch.setattr("qinit.planner.auto.free_memory", lambda device: 10**10)


@pytest.fixture
def compare(command, strong_reader):
    """Return a function that runs `qinit compare MODEL ARGUMENTS` where test.txt and train.txt are."""
    Path("test.txt").write_text(TEXT)
    Path("train.txt").write_text(TRAINING)
    Path("short.txt").write_text(words(7, 8, 9))
    return lambda *arguments, model=strong_reader: command("compare", model, *arguments)


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the pictures out, which take a second."""
    for module in ("matplotlib.figure", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return {}, tmp_path_factory.mktemp("shelf")


@pytest.fixture
def compared(compare, undrawn, shelf):
    """Return a function that puts into `out` what a comparison with STARTS, TUNING and more options leaves there, the
    times of the cells too; each is made once in a file of tests."""
    made, place = shelf

    def put(*more):
        if more in made:
            shutil.copytree(made[more], "out")
        else:
            assert compare(*STARTS, *TUNING, *more)[0] == 0
            made[more] = shutil.copytree("out", place / str(len(made)))

    return put
