import itertools
import sys

import datasets
import pytest

from qinit.errors import CalibrationError, HubError
from qinit.source.checkpoint import read_json
from qinit.text.sources import check_source, load_samples
from tests.models import make_bert, words

NAME = "someone/words"


class StandIn:
    """Takes the place of datasets.load_dataset: `rows` are streamed by `datasets` itself, `asked` is what came in."""

    def __init__(self):
        self.rows = [{"text": words(4, 5)}, {"text": ""}, {"text": words(6, 7)}]
        self.error = None
        self.asked = None
        self.read = 0

    def __call__(self, *names, **options):
        self.asked = (*names, options)
        if self.error:
            raise self.error
        return datasets.IterableDataset.from_generator(self._stream)

    def _stream(self):
        for row in self.rows:
            self.read += 1
            yield row

    def __reduce__(self):  # `datasets` hashes what it streams from
        return (StandIn, ())


@pytest.fixture
def stand_in(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr("datasets.load_dataset", stand_in)
    return stand_in


def load(source, directory, *, samples=4, length=2, seed=0, **options):
    config = read_json(directory / "config.json", "")
    check_source(source, directory, config)
    return load_samples(source, directory, config, samples=samples, length=length, seed=seed, **options)


def test_its_documents_are_one_stream(reader, stand_in):
    found = load(NAME, reader)
    assert found.tokens.tolist() == [[4, 5], [6, 7]]
    assert found.origin == "2 windows of 2 tokens from someone/words, seed 0"


@pytest.mark.parametrize(
    ("source", "name", "config", "split"),
    [
        ("someone/words", "someone/words", None, "train"),
        ("words", "words", None, "train"),
        ("someone/words:small-v1", "someone/words", "small-v1", "train"),
        ("someone/words@test", "someone/words", None, "test"),
        ("words-v1.5:en.raw@validation", "words-v1.5", "en.raw", "validation"),
        ("someone/words.v2", "someone/words.v2", None, "train"),
    ],
)
def test_name_configuration_and_split(reader, stand_in, source, name, config, split):
    load(source, reader)
    assert stand_in.asked == (name, config, {"split": split, "streaming": True, "token": None})


def test_the_token_is_passed_on(reader, stand_in):
    load(NAME, reader, token=" hf_secret\n")
    assert stand_in.asked[-1]["token"] == "hf_secret"


def test_another_field(reader, stand_in):
    stand_in.rows = [{"body": words(4, 5), "id": 1}]
    assert load(NAME, reader, text_field="body").tokens.tolist() == [[4, 5]]
    with pytest.raises(
        CalibrationError, match=r"someone/words, row 1: no field 'text'; its fields are body, id; choose"
    ):
        load(NAME, reader)


def test_only_what_is_needed_is_fetched(reader, stand_in):
    stand_in.rows = ({"text": words(*[4 + i % 200] * 1000)} for i in itertools.count())
    found = load(NAME, reader, samples=8, length=16)
    assert found.tokens.shape == (8, 16)
    assert 200 < stand_in.read < 500  # 2^20 characters of 3000 to 4000 each


def test_an_encoder_gets_four_times_as_many_documents_as_it_draws_from(tmp_path, stand_in):
    stand_in.rows = ({"text": words(4 + i % 200)} for i in itertools.count())
    found = load(NAME, make_bert(tmp_path / "bert"), length=8)
    assert found.tokens.shape == (4, 3)
    assert stand_in.read == 16


def test_without_text_there_is_nothing(reader, stand_in):
    stand_in.rows = [{"text": ""}, {"text": None}]
    with pytest.raises(CalibrationError, match="someone/words: field 'text' holds no text in any of its rows"):
        load(NAME, reader)


def test_the_package_is_optional_and_its_absence_says_what_to_install(reader, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    config = read_json(reader / "config.json", "")
    with pytest.raises(CalibrationError, match=r'need the package `datasets`: pip install "qinit\[datasets\]"'):
        check_source(NAME, reader, config)
    with pytest.raises(CalibrationError, match=r'cannot be imported .*pip install "qinit\[datasets\]"'):
        load_samples(NAME, reader, config, samples=1, length=2, seed=0)


def test_offline_and_not_in_the_cache(reader):
    """What `datasets` itself says here, where no test reaches the network."""
    with pytest.raises(HubError, match=r"^someone/words: no such file here, and the Hub cannot be reached; check"):
        load(NAME, reader)


def test_a_misspelt_keyword_is_taken_for_a_data_set_but_asked_about(reader):
    with pytest.raises(HubError, match=r"radom: no such file here \(did you mean 'random'\?\), and the Hub"):
        load("radom", reader)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist on the Hub or cannot be accessed."),
            r"no such file here and no such data set on the Hub \(a private or gated one needs HF_TOKEN\)",
        ),
        (ConnectionError("hf_secret"), "the Hub cannot be reached"),
        (
            ValueError("Config name is missing.\nPlease pick one among: ['a', 'b'] hf_secret"),
            r"cannot be read \(ValueError: Config name is missing. Please pick .* \*\*\*\); a configuration and",
        ),
        (OSError("Bearer hf_secret"), r"cannot be read \(OSError: Bearer \*\*\*\)"),
    ],
)
def test_every_failure_is_one_line_without_the_token(reader, stand_in, error, message):
    stand_in.error = error
    with pytest.raises(HubError, match=f"^{NAME}: .*{message}") as caught:
        load(NAME, reader, token="hf_secret")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_nor_is_the_token_told_that_the_machine_has_anyway(reader, stand_in, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_machine")
    stand_in.error = OSError("Bearer hf_machine")
    with pytest.raises(HubError, match=r"OSError: Bearer \*\*\*"):
        load(NAME, reader)


def test_a_stream_that_breaks_midway_is_such_a_failure(reader, stand_in):
    def rows():
        yield {"text": "w4"}
        raise OSError("broken pipe")

    stand_in.rows = rows()
    with pytest.raises(HubError, match=r"cannot be read \(OSError: broken pipe\)"):
        load(NAME, reader)


def test_a_token_that_is_none_never_reaches_the_hub(reader, stand_in):
    with pytest.raises(HubError, match="token holds characters that no token has") as caught:
        load(NAME, reader, token="hf_\nsecret")
    assert "secret" not in str(caught.value)
    assert stand_in.asked is None


@pytest.mark.parametrize("source", ["json", "text@train", "csv@train"])
def test_a_file_format_is_no_data_set(reader, stand_in, source):
    """`datasets` would read whatever files lie in the working directory."""
    with pytest.raises(CalibrationError, match="is the name of a file format, not of a data set"):
        load(source, reader)
    assert stand_in.asked is None


def test_progress_bars_are_hidden_meanwhile_only(reader, stand_in):
    from datasets.utils import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()
    load(NAME, reader)
    assert not are_progress_bars_disabled()
