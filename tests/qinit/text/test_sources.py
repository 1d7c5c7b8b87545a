import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinit.errors import CalibrationError
from qinit.source.checkpoint import read_json
from qinit.source.demo import demo_directory, held_out_text
from qinit.text.documents import read_file
from qinit.text.sources import check_source, load_samples, sampling_cost
from tests.fuzz import changed, changes, examples, file_of, json_values, only_qinit_errors
from tests.models import UNKNOWN, add_tokenizer, make_bert, make_checkpoint, make_reader, words

IDS = list(range(4, 254))  # 250 words: 31 windows of 8, 2 left over


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(words(*IDS))
    return tmp_path / "text.txt"


def load(source, directory, *, samples=4, length=8, seed=0, **options):
    config = read_json(directory / "config.json", "")
    check_source(str(source), directory, config)
    return load_samples(str(source), directory, config, samples=samples, length=length, seed=seed, **options)


def refusal(source, directory, *, planned=True, config=None, **options):
    """Return the one line that refuses; where `planned`, planning already says the same."""
    config = read_json(directory / "config.json", "") if config is None else config
    options = {"samples": 4, "length": 8, "seed": 0, **options}
    with pytest.raises(CalibrationError) as caught:
        load_samples(str(source), directory, config, **options)
    message = str(caught.value)
    assert "\n" not in message
    if planned:
        with pytest.raises(CalibrationError) as early:
            check_source(str(source), directory, config)
        assert str(early.value) == message
    else:
        check_source(str(source), directory, config)
    return message


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


class TestJsonl:
    def write(self, path, *rows):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    def test_its_documents_are_one_stream(self, reader, tmp_path):
        path = self.write(tmp_path / "a.jsonl", {"text": words(4, 5, 6)}, {"text": words(7, 8)}, {"text": words(9)})
        assert load(path, reader, length=2).tokens.tolist() == [[4, 5], [6, 7], [8, 9]]

    def test_the_text_can_be_in_another_field_and_another_suffix(self, reader, tmp_path):
        path = self.write(tmp_path / "a.json", {"body": words(4, 5), "text": 7})
        assert load(path, reader, length=2, text_field="body").tokens.tolist() == [[4, 5]]

    def test_blank_lines_null_and_line_separators_within_strings_are_fine(self, reader, tmp_path):
        path = self.write(tmp_path / "a.jsonl", {"text": None}, {"text": "w4\u2028w5"})
        path.write_text("\n" + path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        assert load(path, reader, length=2).tokens.tolist() == [[4, 5]]

    def test_a_missing_field_is_named_with_the_line_and_the_fields_there_are(self, reader, tmp_path):
        path = self.write(tmp_path / "a.jsonl", {"text": "w4"}, {"texts": "w4", "id": 1})
        message = refusal(path, reader, planned=False)
        assert message == (
            f"{path}, line 2: no field 'text' (did you mean 'texts'?); its fields are texts, id; "
            "choose one with --text-field"
        )

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{nonsense", r"line 2: not valid JSON (Expecting property name"),
            ("[1]", "line 2: expected an object with a field 'text', found list"),
            (
                '{"text": 7, "body": "w4"}',
                "line 2: field 'text' holds int, expected text; choose another of text, body",
            ),
            ("{}", "line 2: no field 'text'; its fields are none"),
        ],
    )
    def test_a_line_that_is_no_document_is_named(self, reader, tmp_path, line, message):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "w4"}\n' + line + "\n")
        assert f"{path}, {message}" in refusal(path, reader, planned=False)

    def test_documents_without_text_are_an_error(self, reader, tmp_path):
        path = self.write(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n"})
        assert refusal(path, reader, planned=False) == f"{path}: field 'text' holds no text in any of its rows"


class TestRandom:
    def test_every_id_but_the_special_ones_is_as_likely(self, tmp_path):
        directory = make_checkpoint(tmp_path / "model", vocab_size=16, eos_token_id=[2, 5])
        found = load("random", directory, samples=200, length=100)
        assert found.tokens.dtype == torch.int64
        counts = found.tokens.flatten().bincount(minlength=16)
        assert counts.nonzero().flatten().tolist() == [3, 4, *range(6, 16)]
        expected = 20000 / 12
        assert (counts[counts > 0] - expected).abs().max() < 5 * expected**0.5
        assert found.mask is None
        assert found.origin == "200 samples of 100 random tokens, seed 0"

    def test_the_seed_decides_and_the_global_generator_is_left_alone(self, tiny_llama):
        state = torch.get_rng_state()
        first, again, other = (load("random", tiny_llama, seed=seed).tokens for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(state, torch.get_rng_state())

    def test_the_length_is_cut(self, tiny_llama):
        assert load("random", tiny_llama, length=1000).tokens.shape == (4, 128)

    def test_the_vocabulary_of_a_multimodal_model_is_in_its_text_config(self, tmp_path):
        text = {"vocab_size": 10, "bos_token_id": 4, "max_position_embeddings": 6}
        config = {"architectures": ["XForConditionalGeneration"], "image_token_id": 5, "text_config": text}
        found = load_samples("random", tmp_path, config, samples=50, length=8, seed=0)
        assert found.tokens.shape == (50, 6)
        assert found.tokens.unique().tolist() == [0, 1, 2, 3, 6, 7, 8, 9]

    def test_sizes_that_no_file_spells_out_are_the_class_defaults(self, tmp_path):
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load("random", tmp_path, samples=200, length=2000).tokens.shape == (200, 1024)

    def test_without_a_vocabulary_there_is_nothing_to_draw_from(self, tmp_path):
        message = refusal("random", tmp_path, config={})
        assert message.startswith(f"{tmp_path / 'config.json'}: no vocab_size")

    def test_a_vocabulary_of_special_tokens_only_is_an_error(self, tmp_path):
        config = {"vocab_size": 2, "bos_token_id": 0, "eos_token_id": 1}
        assert "all 2 ids of the vocabulary are special" in refusal("random", tmp_path, config=config)


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
        path = TestJsonl().write(tmp_path / "a.jsonl", *({"text": f"w{i}\n\nw{i}"} for i in range(4, 100)))
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

    def test_an_encoder_does_not_write(self, bert):
        message = refusal("self", bert)
        assert "`self` needs a causal language model" in message
        assert "found BertForMaskedLM; calibrate on a text file or on `random`" in message

    def test_a_length_that_only_the_special_tokens_fit_in_is_an_error(self, bert, text):
        assert "makes no tokens of this text, within 2" in refusal(text, bert, planned=False, length=2)


class TestRefusals:
    def test_no_such_file_lists_what_a_source_may_be(self, reader):
        for source in ("gone.txt", "./gone", "/gone/gone", "a/b/c", "two words", "gone/text.jsonl", "~/gone", "-x"):
            message = refusal(source, reader)
            assert message.startswith(f"{source}: no such file; SOURCE may be a text file, a JSONL file")
            assert "`self`" in message
            assert "`random`" in message
            assert "owner/name:config@split" in message

    def test_a_directory_is_no_source(self, reader, tmp_path, monkeypatch):
        assert refusal(tmp_path, reader) == f"{tmp_path}: is a directory; give one text file or JSONL file"
        monkeypatch.chdir(tmp_path.parent)
        assert "no such file" in refusal(f"{tmp_path.name}:part", reader)  # `datasets` would read the directory

    def test_a_name_that_no_file_system_takes(self, reader):
        assert "cannot be looked at" in refusal("x" * 300, reader)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "holds no text (it is empty)"),
            (b" \n\t\n", "holds no text"),
            (b"w4 \xff\xfe", "not UTF-8 text (byte 3 cannot be decoded); convert it"),
        ],
    )
    def test_a_file_without_text(self, reader, tmp_path, content, message):
        (tmp_path / "a.txt").write_bytes(content)
        assert refusal(tmp_path / "a.txt", reader).startswith(f"{tmp_path / 'a.txt'}: {message}")

    def test_a_file_that_cannot_be_read(self, reader, text, monkeypatch):
        def fail(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("qinit.text.documents.read_regular", fail)
        assert refusal(text, reader).startswith(f"{text}: cannot be read (Permission denied); give one text file")

    def test_a_file_too_large_to_be_read_whole(self, reader, text, monkeypatch):
        monkeypatch.setattr("qinit.text.documents.LARGEST_FILE", 100)
        assert "an excerpt is enough" in refusal(text, reader)

    def test_text_that_tokenizes_to_nothing(self, tmp_path):
        directory = make_reader(tmp_path / "model")
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[^w0-9]"}, "content": " "}
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        (tmp_path / "a.txt").write_text("...")
        message = refusal(tmp_path / "a.txt", directory, planned=False)
        assert message == f"{tmp_path / 'a.txt'}: the model's tokenizer makes no tokens of this text; give another text"

    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])  # the last two come up as an empty tokenizer
    def test_without_a_tokenizer_the_message_names_what_needs_none(self, tmp_path, text, family):
        message = refusal(text, make_checkpoint(tmp_path / "model", family))
        assert message.startswith(str(tmp_path / "model"))
        assert "no tokenizer" in message
        assert "`self` and `random` do without" in message

    def test_the_tokenizer_of_another_model(self, tmp_path, text):
        directory = make_reader(tmp_path / "model", vocab_size=100)
        message = refusal(text, directory, planned=False)
        assert message.startswith(f"{text}: the tokenizer made token id 253, but the model has ids up to 99 (")
        assert message.endswith("vocab_size 100); the tokenizer is that of another model")

    def test_unknown_words_are_words(self, reader, tmp_path):
        (tmp_path / "a.txt").write_text("never heard")
        assert load(tmp_path / "a.txt", reader).tokens.tolist() == [[UNKNOWN, UNKNOWN]]

    @pytest.mark.parametrize(("samples", "length"), [(0, 8), (4, 1), (-1, 8)])
    def test_nothing_to_draw(self, reader, text, samples, length):
        message = refusal(text, reader, planned=False, samples=samples, length=length)
        assert message == f"expected at least 1 sample of at least 2 tokens, found {samples} of {length}"


def test_a_file_called_random_is_given_with_its_directory(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").write_text(words(4, 5))
    assert load("./random", reader).tokens.tolist() == [[4, 5]]
    assert load("random", reader).tokens.shape == (4, 8)


def test_the_cost_of_writing_is_two_operations_per_parameter_and_token():
    assert sampling_cost(7_000_000_000, 128, 2048) == 2 * 7e9 * 128 * 2048


@examples(150)
@given(
    st.sampled_from(["a.txt", "a.jsonl"]),
    st.binary(max_size=40)
    | st.lists(json_values, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.builds(changed, st.just(b'{"text": "w5 w6", "n": [1, {"a": null}]}\n\n{"text": "w7"}\n'), changes),
)
def test_fuzz_bytes_are_documents_or_refused(name, raw):
    with file_of(raw, name) as file, only_qinit_errors():
        documents = read_file(file)
        assert any(document.strip() for document in documents)
        "".join(documents).encode()
