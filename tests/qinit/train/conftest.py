import pytest

from tests.qinit.train.starts import load, split


@pytest.fixture(scope="module")
def start(strong_llama):
    """A model, with its bases and factors."""
    return strong_llama, *split(load(strong_llama))
