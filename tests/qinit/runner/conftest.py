"""Finished runs that tests polish further."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qinit.files.manifest import refresh
from tests.helpers import edit_json, quantize
from tests.qinit.runner.polishing import KINDS


@pytest.fixture(scope="session")
def made(strong_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished runs of every kind, not to be changed."""
    place = tmp_path_factory.mktemp("made")

    def run(kind: str) -> Path:
        if not (place / kind).exists():
            quantize(strong_llama, place / kind, **KINDS[kind])
        return place / kind

    return run


@pytest.fixture
def ready(made: Callable[[str], Path], place: Path) -> Callable[[str], Path]:
    """Return a function that gives a copy of a run of a kind, which names itself as its base."""

    def copy(kind: str = "packed") -> Path:
        shutil.copytree(made(kind), place / "out")
        edit_json(
            place / "out/eqft_init/adapter_config.json",
            lambda config: config.update(base_model_name_or_path=str(place / "out")),
        )
        refresh(place / "out", ["eqft_init/adapter_config.json"])
        return place / "out"

    return copy
