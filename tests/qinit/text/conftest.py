import pytest

from tests.models import make_bert, words
from tests.qinit.text.loading import IDS


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(words(*IDS))
    return tmp_path / "text.txt"
