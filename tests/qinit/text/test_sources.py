import json

import pytest
import torch

from qinit.source.demo import demo_directory
from qinit.text.sources import load_samples
from tests.models import make_checkpoint, words
from tests.qinit.text.loading import load, refusal


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

    def test_what_an_encoder_reads_for_a_decoder_ends_with_eos_as_sequence_heads_want_it(self, tmp_path):
        tokens = load("random", make_checkpoint(tmp_path / "model", "bart"), samples=9, length=7).tokens
        assert (tokens == 2).nonzero().tolist() == [[row, 6] for row in range(9)]

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


class TestRefusals:
    def test_no_such_file_lists_what_a_source_may_be(self, reader):
        for source in ("gone.txt", "./gone", "/gone/gone", "a/b/c", "two words", "gone/text.jsonl", "~/gone", "-x"):
            message = refusal(source, reader)
            assert message.startswith(f"{source}: no such file; SOURCE may be a text file, a JSONL file")
            assert "`self`" in message
            assert "`random`" in message
            assert "owner/name:config@split" in message

    def test_a_name_that_no_file_system_takes(self, reader):
        assert "cannot be looked at" in refusal("x" * 300, reader)

    @pytest.mark.parametrize(("samples", "length"), [(0, 8), (4, 1), (-1, 8)])
    def test_nothing_to_draw(self, reader, text, samples, length):
        message = refusal(text, reader, planned=False, samples=samples, length=length)
        assert message == f"expected at least 1 sample of at least 2 tokens, found {samples} of {length}"


class TestBundled:
    """The text that qinit brings."""

    @pytest.fixture(autouse=True)
    def documents(self, monkeypatch):
        """Three documents of ten words each."""
        found = [words(*range(start, start + 10)) for start in (10, 20, 30)]
        monkeypatch.setattr("qinit.text.sources.calibration_documents", lambda: found)

    def test_a_causal_model_gets_windows_of_the_joined_text(self, reader):
        found = load("text", reader, samples=2, length=8)
        assert found.tokens.shape == (2, 8)
        assert all(row[0] % 8 == 2 and row == list(range(row[0], row[0] + 8)) for row in found.tokens.tolist())
        assert found.origin == "2 windows of 8 tokens from the text that qinit brings, seed 0"
        assert torch.equal(found.tokens, load("text", reader, samples=2, length=8).tokens)
        others = [load("text", reader, samples=2, length=8, seed=seed).tokens for seed in range(1, 4)]
        assert not all(torch.equal(found.tokens, other) for other in others)

    def test_an_encoder_gets_documents(self, bert):
        found = load("text", bert, samples=4, length=32)
        count, longest = found.tokens.shape
        assert longest <= 32
        assert count >= 2
        assert found.origin == f"{count} texts of up to {longest} tokens from the text that qinit brings, seed 0"

    def test_it_needs_the_tokenizer_and_has_no_fields(self, llama, reader):
        assert "calibrating on text needs it (`self` and `random` do without)" in refusal("text", llama)
        message = refusal("text", reader, planned=False, text_field="body")
        assert message.startswith("text: has no field 'body'")


def test_the_text_that_qinit_brings_is_enough_for_the_default():
    found = load("text", demo_directory(), samples=128, length=512)
    assert found.tokens.shape == (128, 512)
    assert len(found.tokens.unique()) > 1000


@pytest.mark.parametrize("name", ["random", "text", "self"])
def test_a_file_called_as_a_source_is_given_with_its_directory(reader, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(words(4, 5))
    assert load(f"./{name}", reader).tokens.tolist() == [[4, 5]]
    assert load(name, reader).tokens.shape == (4, 8)


def test_an_encoder_does_not_write(bert):
    message = refusal("self", bert)
    assert "`self` needs a causal language model" in message
    assert "found BertForMaskedLM; calibrate on a text file or on `random`" in message
