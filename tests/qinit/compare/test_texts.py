from pathlib import Path

import numpy as np
import pytest

from qinit.compare.texts import Text, read_source, split, tokenized
from qinit.errors import CalibrationError, CompareError
from qinit.evaluate.text import Text as Words
from qinit.source.checkpoint import Checkpoint
from tests.models import add_tokenizer, make_reader, words


def test_documents_are_joined_by_blank_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one"}\n{"body": "two"}\n')
    text = read_source(str(file), 10, "body", None)
    assert (text.name, text.text) == ("a.jsonl", "one\n\ntwo")


@pytest.mark.parametrize("source", ["missing.txt", "./no/such", "a b c"])
def test_what_is_no_file_and_no_data_set(source):
    with pytest.raises(CompareError, match="no such file, and no data set id"):
        read_source(source, 10, None, None)


def test_a_data_set_without_the_package(monkeypatch):
    monkeypatch.setattr("qinit.text.hub_documents.importlib.util.find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"pip install \"qinit\[datasets\]\""):
        read_source("owner/name:config@test", 10, None, None)


def test_a_data_set_is_read_as_far_as_is_wanted(monkeypatch):
    asked = {}

    def read(source, text_field, token, **limits):
        asked.update(source=source, token=token, **limits)
        return ["one", "", "two"]

    monkeypatch.setattr("qinit.evaluate.text.read_hub", read)
    text = read_source("owner/name:config@test", 10, None, "t")
    assert (text.name, text.text) == ("owner/name:config@test", "one\n\n\n\ntwo")
    assert (asked["source"], asked["token"], asked["characters"]) == ("owner/name:config@test", "t", 160)


def test_tokens_are_those_that_eval_takes(tmp_path):
    checkpoint = Checkpoint.open(make_reader(tmp_path / "m", bos=True))
    (text,) = tokenized(checkpoint, [Words("t", words(9, 8, 7), "one text")])
    assert (text.name, text.ids.tolist()) == ("t", [1, 9, 8, 7])


def test_a_tokenizer_of_another_model(tmp_path):
    checkpoint = Checkpoint.open(add_tokenizer(make_reader(tmp_path / "m"), size=300))
    with pytest.raises(CalibrationError, match=r"t: the tokenizer made token id 299, but the model has ids up to 255"):
        tokenized(checkpoint, [Words("t", words(5, 299), "one text")])


def test_the_end_is_held_out_but_not_too_much():
    part, validation = split(Text("t", np.arange(1000)))
    assert (len(part.ids), validation.ids.tolist()) == (900, list(range(900, 1000)))
    assert len(split(Text("t", np.arange(200_000)))[1].ids) == 16384


def test_a_digest_is_of_the_tokens_alone():
    one, other = Text("a", np.arange(9)), Text("b", np.arange(9))
    assert one.digest == other.digest
    assert one.digest != Text("a", np.arange(10)).digest
    assert Path(one.digest).name == one.digest


def test_several_texts_as_one():
    joined = Text.joined([Text("a", np.arange(2)), Text("b", np.arange(3))])
    assert (joined.name, joined.ids.tolist()) == ("a + b", [0, 1, 0, 1, 2])
