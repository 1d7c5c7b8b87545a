"""The runs, each made once for all tests, and copies of them to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.qinit.verification.runs import KINDS, make_run

Runs = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a function that gives a kind's source and run."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            made[kind] = make_run(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(params=KINDS)
def each_run(request: pytest.FixtureRequest, runs: Runs) -> tuple[Path, Path]:
    """A source and its run, of every kind in turn; not to be changed."""
    return runs(request.param)


@pytest.fixture
def copy_of(runs: Runs, tmp_path: Path) -> Runs:
    """Return a function that gives a kind's source and a copy of its run in another place, to damage."""

    def get(kind: str) -> tuple[Path, Path]:
        source, run = runs(kind)
        return source, Path(shutil.copytree(run, tmp_path / "run"))

    return get
