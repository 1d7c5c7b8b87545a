"""Finished runs that tests of this folder polish further."""

import shutil

import pytest

from qinit.files.manifest import refresh
from tests.helpers import edit_json, quantize
from tests.qinit.runner.polishing import KINDS


@pytest.fixture(scope="session")
def made(strong_llama, tmp_path_factory):
    """Finished runs of every kind, not to be changed."""
    place = tmp_path_factory.mktemp("made")

    def run(kind):
        if not (place / kind).exists():
            quantize(strong_llama, place / kind, **KINDS[kind])
        return place / kind

    return run


@pytest.fixture
def ready(made, place):
    """Return a function that gives a copy of a run of a kind, which names itself as its base."""

    def copy(kind="packed"):
        shutil.copytree(made(kind), place / "out")
        edit_json(
            place / "out/eqft_init/adapter_config.json",
            lambda config: config.update(base_model_name_or_path=str(place / "out")),
        )
        refresh(place / "out", ["eqft_init/adapter_config.json"])
        return place / "out"

    return copy
