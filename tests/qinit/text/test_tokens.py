import json

import pytest
import torch

from qinit.source.demo import demo_directory, held_out_text
from tests.models import UNKNOWN, add_tokenizer, make_bert, make_checkpoint, make_reader, words
from tests.qinit.text.loading import IDS, load, refusal, write_rows


class TestWindows:
    def test_they_are_different_whole_windows_of_the_text_in_its_order(self, reader, text):
        found = load(text, reader)
        assert found.tokens.dtype == torch.int64
        assert found.tokens.shape == (4, 8)
        assert found.mask is None
        starts = [row[0] for row in found.tokens.tolist()]
        assert found.tokens.tolist() == [list(range(start, start + 8)) for start in starts]
        assert starts == sorted(set(starts))
        assert all((start - IDS[0]) % 8 == 0 for start in starts)

    def test_the_seed_decides_which(self, reader, text):
        first, again, other = load(text, reader), load(text, reader), load(text, reader, seed=1)
        assert torch.equal(first.tokens, again.tokens)
        assert not torch.equal(first.tokens, other.tokens)

    def test_every_window_can_be_drawn(self, reader, text):
        starts = {row[0] for seed in range(60) for row in load(text, reader, seed=seed).tokens.tolist()}
        assert starts == set(IDS[: 31 * 8 : 8])

    def test_all_are_taken_when_there_are_fewer_and_what_is_left_over_is_dropped(self, reader, text):
        found = load(text, reader, samples=1000)
        assert found.tokens.flatten().tolist() == IDS[: 31 * 8]
        assert found.origin == "31 windows of 8 tokens from text.txt, seed 0"

    def test_a_text_shorter_than_one_window_is_one_short_sample(self, reader, tmp_path):
        (tmp_path / "short.txt").write_text(words(4, 5, 6))
        found = load(tmp_path / "short.txt", reader)
        assert found.tokens.tolist() == [[4, 5, 6]]
        assert found.mask is None
        assert found.origin == "1 window of 3 tokens from short.txt, seed 0"

    def test_the_length_is_cut_to_what_the_model_takes(self, reader, text):
        assert load(text, reader, samples=1, length=4096).tokens.shape == (1, 128)

    def test_n_positions_counts_too(self, tmp_path, text):
        gpt2 = add_tokenizer(make_checkpoint(tmp_path / "gpt2", "gpt2", n_positions=16))
        assert load(text, gpt2, length=64).tokens.shape == (4, 16)

    def test_bos_is_in_front_of_every_sample_where_the_tokenizer_puts_it(self, tmp_path, text):
        found = load(text, make_reader(tmp_path / "model", bos=True), samples=1000)
        assert found.tokens.shape == (250 // 7, 8)
        assert set(found.tokens[:, 0].tolist()) == {1}
        assert found.tokens[:, 1:].flatten().tolist() == IDS[: 250 // 7 * 7]

    def test_there_is_no_bos_where_the_tokenizer_puts_none(self, reader, text):
        assert 1 not in load(text, reader, samples=1000).tokens

    def test_a_long_text_is_not_tokenized_as_a_whole_but_drawn_from_everywhere(self, reader, tmp_path, monkeypatch):
        monkeypatch.setattr("qinit.text.tokens.PIECE", 100)
        monkeypatch.setattr("qinit.text.tokens.characters_for", lambda samples, length: 400)
        (tmp_path / "long.txt").write_text("\n".join(words(*[i] * 16) for i in range(100, 250)))
        found = load(tmp_path / "long.txt", reader, samples=1000)
        assert len(found.tokens) == 4 * 2  # 4 pieces of a line of 16 words
        assert found.tokens.flatten().tolist() == sorted(found.tokens.flatten().tolist())
        assert load(tmp_path / "long.txt", reader, seed=1).tokens.tolist() != found.tokens.tolist()

    def test_a_long_line_is_cut_in_pieces_too(self, reader, text, monkeypatch):
        monkeypatch.setattr("qinit.text.tokens.PIECE", 50)
        tokens = load(text, reader, samples=1000).tokens
        cut = set(IDS) - set(tokens.flatten().tolist())
        assert len(cut) < 60  # cut words have other ids; the rest is all there
        assert len(tokens) >= 30

    def test_the_demo_model_reads_its_own_held_out_text(self, tmp_path):
        (tmp_path / "heldout.txt").write_text(held_out_text(), encoding="utf-8")
        found = load(tmp_path / "heldout.txt", demo_directory(), samples=3, length=64)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(demo_directory())
        assert found.tokens.shape == (3, 64)
        assert all(tokenizer.decode(row) in held_out_text() for row in found.tokens)

    def test_windows_newlines_and_a_byte_order_mark_are_not_part_of_the_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"one line\nand another\n")
        (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + b"one line\r\nand another\r\n")
        a, b = (load(tmp_path / name, demo_directory(), length=64).tokens for name in ("a.txt", "b.txt"))
        assert torch.equal(a, b)


class TestEncoder:
    def test_paragraphs_are_encoded_on_their_own_and_padded(self, bert, tmp_path):
        (tmp_path / "a.txt").write_text(f"{words(4, 5)}\n{words(6)}\n \n\n{words(7)}\n\n{words(*range(10, 30))}\n")
        found = load(tmp_path / "a.txt", bert)
        assert found.tokens.tolist() == [
            [1, 4, 5, 6, 2, 0, 0, 0],
            [1, 7, 2, 0, 0, 0, 0, 0],
            [1, 10, 11, 12, 13, 14, 15, 2],
        ]
        assert found.mask is not None
        assert found.mask.dtype == torch.bool
        assert found.mask.sum(dim=1).tolist() == [5, 3, 8]
        assert torch.equal(found.mask, found.tokens != 0)
        assert found.count == 16
        assert found.origin == "3 texts of up to 8 tokens from a.txt, seed 0"

    def test_documents_of_jsonl_are_not_taken_apart_and_drawn_by_the_seed(self, bert, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", *({"text": f"w{i}\n\nw{i}"} for i in range(4, 100)))
        first, again, other = (load(path, bert, seed=seed).tokens for seed in (0, 0, 1))
        assert first.shape == (4, 4)
        assert torch.equal(first[:, 1], first[:, 2])
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_without_padding_there_is_no_mask(self, bert, tmp_path):
        (tmp_path / "a.txt").write_text(f"{words(4)}\n\n{words(5)}")
        assert load(tmp_path / "a.txt", bert).mask is None

    def test_the_length_is_cut_to_the_positions_and_to_the_tokenizer_s_limit(self, bert, tmp_path, text):
        assert load(text, bert, length=512).tokens.shape == (1, 32)
        limited = add_tokenizer(make_bert(tmp_path / "limited"), encoder=True, model_max_length=30)
        assert load(text, limited, length=512).tokens.shape == (1, 30)

    def test_padding_has_the_configuration_s_id(self, tmp_path):
        directory = make_bert(tmp_path / "model", pad_token_id=9)
        (tmp_path / "a.txt").write_text(f"{words(4, 5)}\n\n{words(6)}")
        assert load(tmp_path / "a.txt", directory).tokens.tolist() == [[1, 4, 5, 2], [1, 6, 2, 9]]

    def test_a_length_that_only_the_special_tokens_fit_in_is_an_error(self, bert, text):
        assert "makes no tokens of this text, within 2" in refusal(text, bert, planned=False, length=2)


def test_text_that_tokenizes_to_nothing(tmp_path):
    directory = make_reader(tmp_path / "model")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[^w0-9]"}, "content": " "}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "a.txt").write_text("...")
    message = refusal(tmp_path / "a.txt", directory, planned=False)
    assert message == f"{tmp_path / 'a.txt'}: the model's tokenizer makes no tokens of this text; give another text"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])  # the last two come up as an empty tokenizer
def test_without_a_tokenizer_the_message_names_what_needs_none(tmp_path, text, family):
    message = refusal(text, make_checkpoint(tmp_path / "model", family))
    assert message.startswith(str(tmp_path / "model"))
    assert "no tokenizer" in message
    assert "`self` and `random` do without" in message


def test_the_tokenizer_of_another_model(tmp_path, text):
    directory = make_reader(tmp_path / "model", vocab_size=100)
    message = refusal(text, directory, planned=False)
    assert message.startswith(f"{text}: the tokenizer made token id 253, but the model has ids up to 99 (")
    assert message.endswith("vocab_size 100); the tokenizer is that of another model")


def test_unknown_words_are_words(reader, tmp_path):
    (tmp_path / "a.txt").write_text("never heard")
    assert load(tmp_path / "a.txt", reader).tokens.tolist() == [[UNKNOWN, UNKNOWN]]
