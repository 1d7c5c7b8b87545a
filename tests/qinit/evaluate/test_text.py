import json
import shutil

import pytest
import torch

from qinit.errors import CalibrationError, QinitError
from qinit.evaluate.subject import Subject
from qinit.evaluate.text import (
    HELD_OUT,
    Text,
    file_text,
    hub_text,
    is_demo,
    length_for,
    own_text,
    require_same_tokens,
    tokenize,
)
from qinit.source.demo import DEMO_WINDOW, demo_directory, held_out_text
from tests.models import add_tokenizer, make_checkpoint, words
from tests.qinit.text.test_hub_documents import StandIn


def facts(directory):
    return Subject("m", directory).facts


class TestFiles:
    def test_a_text_file_is_one_text(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        assert file_text(tmp_path / "a.txt", None) == Text("a.txt", "one\n\ntwo\n", "one text")

    def test_lines_of_json_are_joined_by_blank_lines_and_those_without_text_count(self, tmp_path):
        rows = [" = Title = \n", "", "first\n", None]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        found = file_text(tmp_path / "a.jsonl", None)
        # As the literature joins WikiText: "\n\n".join(rows), the blank ones among them.
        assert found.text == "\n\n".join(row or "" for row in rows)
        assert found.joined == "4 documents joined with blank lines"

    def test_another_field(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"page": "x"}\n')
        assert file_text(tmp_path / "a.jsonl", "page").text == "x"
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(QinitError, match="has no fields, so no 'page'"):
            file_text(tmp_path / "a.txt", "page")

    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(QinitError, match=r"gone\.txt: no such file"):
            file_text(tmp_path / "gone.txt", None)


class TestHub:
    @pytest.fixture
    def stand_in(self, monkeypatch):
        stand_in = StandIn()
        monkeypatch.setattr("datasets.load_dataset", stand_in)
        return stand_in

    def test_all_rows_of_the_test_split_are_joined(self, stand_in):
        found = hub_text("owner/words:small", None, None, None)
        assert found == Text(
            "owner/words:small@test", f"{words(4, 5)}\n\n\n\n{words(6, 7)}", "3 documents joined with blank lines"
        )
        assert stand_in.asked[:2] == ("owner/words", "small")
        assert stand_in.asked[2]["split"] == "test"

    def test_another_split(self, stand_in):
        assert hub_text("owner/words@train", None, None, None).name == "owner/words@train"
        assert stand_in.asked[2]["split"] == "train"

    def test_no_more_is_fetched_than_the_windows_need(self, stand_in):
        stand_in.rows = [{"text": words(*range(4, 14))}] * 1000
        found = hub_text("owner/words", None, None, 20)
        assert 20 <= len(found.text.split()) < 200
        assert stand_in.read < 20


class TestTokens:
    def test_a_text_is_tokenized_at_once(self, reader):
        found = tokenize(Text("t", words(7, 8, 9), ""), reader, facts(reader))
        assert found.ids.tolist() == [7, 8, 9]
        assert found.special == "no special tokens"

    @pytest.mark.parametrize(
        ("options", "ids", "said"),
        [
            ({"bos": True}, [1, 7, 8], "<s> in front of the whole"),
            ({"encoder": True}, [1, 7, 8, 2], "<s>, </s> around"),
        ],
    )
    def test_the_tokenizer_s_own_special_tokens_are_there_and_said(self, tmp_path, options, ids, said):
        directory = add_tokenizer(make_checkpoint(tmp_path / "m"), **options)
        found = tokenize(Text("t", words(7, 8), ""), directory, facts(directory))
        assert found.ids.tolist() == ids
        assert found.special.startswith(said)

    def test_ids_that_the_model_does_not_have(self, tmp_path):
        directory = add_tokenizer(make_checkpoint(tmp_path / "m"), size=300)
        with pytest.raises(QinitError, match=r"t: the tokenizer made token id 299.*is that of another model"):
            tokenize(Text("t", words(7, 299), ""), directory, facts(directory))

    def test_no_tokenizer_and_no_tokens(self, tmp_path, reader):
        bare = make_checkpoint(tmp_path / "m")
        with pytest.raises(CalibrationError, match="copy the tokenizer files of its original there"):
            tokenize(Text("t", "w7", ""), bare, facts(bare))
        with pytest.raises(QinitError, match="t: the model's tokenizer makes no tokens of this text"):
            tokenize(Text("t", " ", ""), reader, facts(reader))

    def test_a_reference_with_another_tokenizer(self, tmp_path, reader):
        other = tmp_path / "other"
        shutil.copytree(reader, other)
        file = other / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"] |= {"w8": 9, "w9": 8}
        file.write_text(json.dumps(content))
        text = Text("t", words(7, 8, 9), "")
        tokens = tokenize(text, reader, facts(reader))
        with pytest.raises(QinitError, match=r"makes other tokens of it than .* \(the first at token 1\); one of"):
            require_same_tokens(text, tokens, reader, other)
        same = Text("t", words(7, 10), "")  # what the two have in common
        require_same_tokens(same, tokenize(same, reader, facts(reader)), reader, other)
        require_same_tokens(text, tokens, reader, reader)
        require_same_tokens(text, tokens, reader, make_checkpoint(tmp_path / "bare"))  # none at all

    def test_a_reference_that_adds_a_token(self, tmp_path, reader):
        other = add_tokenizer(make_checkpoint(tmp_path / "m"), encoder=True)
        text = Text("t", words(7, 8), "")
        with pytest.raises(QinitError, match=r"\(the first at token 0\)"):
            require_same_tokens(text, tokenize(text, reader, facts(reader)), reader, other)


class TestLength:
    def test_the_default_is_the_literature_s_or_what_the_model_takes(self, tmp_path, reader):
        assert length_for(reader, facts(reader), None) == 128
        longer = make_checkpoint(tmp_path / "m", max_position_embeddings=4096)
        assert length_for(longer, facts(longer), None) == 2048
        assert length_for(longer, facts(longer), 4096) == 4096

    def test_more_than_the_model_takes_is_an_error(self, reader):
        with pytest.raises(QinitError, match="length: 129 is more than the 128 positions of the model"):
            length_for(reader, facts(reader), 129)

    def test_the_demo_model_s_is_what_it_was_trained_on(self):
        assert length_for(demo_directory(), facts(demo_directory()), None) == DEMO_WINDOW


def test_the_demo_model_and_what_was_made_from_it_have_a_text(tmp_path, reader):
    assert is_demo(demo_directory())
    shutil.copy(demo_directory() / "tokenizer.json", tmp_path)
    assert is_demo(tmp_path)
    assert not is_demo(reader)
    assert not is_demo(tmp_path / "gone")
    assert own_text() == Text(HELD_OUT, held_out_text(), "one text")


def test_the_demo_s_tokens_are_the_ones_of_its_tokenizer():
    found = tokenize(own_text(), demo_directory(), facts(demo_directory()))
    assert found.ids.dtype == torch.int64
    assert len(found.ids) + 1 == 54986  # as model_zoo/demo/training.json has it, with the token that ends a document
