"""A model that predicts with some certainty, and a packed run of it; no test changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluated import make_run, make_source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="session")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(source, tmp_path_factory.mktemp("packed") / "run")
