"""The processes that tests fork real runs from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qinit.runner.forking import Forks


@pytest.fixture(scope="session")
def forks(strong_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs of the command line, forked from a process that has loaded everything."""
    text = ["--calibration", "random", "--calibration-samples", 128, "--calibration-length", 32]
    options = ["--rank", 4, "--calibration-mode", "parallel", "--polish", 5]
    with Forks("eqft", strong_llama, "--out", tmp_path_factory.mktemp("warm") / "out", *text, *options) as found:
        yield found
