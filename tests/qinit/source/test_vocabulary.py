import json

import pytest

from qinit.errors import CalibrationError
from qinit.source.vocabulary import LARGEST_VOCABULARY, Facts
from tests.models import make_checkpoint

CAUSAL = {"architectures": ["XForCausalLM"], "vocab_size": 10, "bos_token_id": 1, "max_position_embeddings": 6}


def facts(tmp_path, **config):
    return Facts.read(tmp_path, {**CAUSAL, **config})


def test_a_checkpoint_says_it_all(llama):
    found = Facts.read(llama, json.loads((llama / "config.json").read_text()))
    assert (found.vocabulary, found.positions, found.start, found.pad) == (256, 128, 1, 0)
    assert found.special == {0, 1, 2}
    assert (found.causal, found.architecture) == (True, "LlamaForCausalLM")
    assert found.config_file == llama / "config.json"


@pytest.mark.parametrize(
    ("config", "causal"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, True),
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"architectures": ["GPT2Model"]}, False),
        ({"architectures": ["T5ForConditionalGeneration"]}, False),
        ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {}}, True),  # a decoder that sees
        (
            {"architectures": ["Florence2ForConditionalGeneration"], "text_config": {}, "is_encoder_decoder": True},
            False,
        ),
        ({"architectures": ["BertForMaskedLM"], "text_config": {}}, False),
        ({"architectures": []}, True),  # it is loaded as one
        ({"architectures": [None, 3, "OPTForCausalLM"]}, True),
    ],
)
def test_which_models_predict_the_next_token(tmp_path, config, causal):
    assert facts(tmp_path, **config).causal is causal


class TestIds:
    def test_a_text_starts_with_bos_else_with_eos_wherever_they_are_named(self, tmp_path):
        none = {"bos_token_id": None}
        assert facts(tmp_path, eos_token_id=2).start == 1
        assert facts(tmp_path, **none, eos_token_id=[5, 2]).start == 5
        assert facts(tmp_path, **none, text_config={"bos_token_id": 3}).start == 3
        (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 4, "eos_token_id": 2}))
        assert facts(tmp_path, **none).start == 4
        assert facts(tmp_path).start == 1  # config.json comes first

    def test_an_encoders_text_ends_with_eos_where_a_decoder_follows(self, tmp_path):
        assert facts(tmp_path, eos_token_id=2).end is None
        assert facts(tmp_path, eos_token_id=[5, 2], is_encoder_decoder=True).end == 5
        assert facts(tmp_path, is_encoder_decoder=True).end is None

    def test_special_are_all_ids_that_have_a_name(self, tmp_path):
        found = facts(
            tmp_path,
            eos_token_id=[2, 7],
            pad_token_id=0,
            image_token_id=8,
            text_config={"audio_token_index": 9, "vocab_size": 3},
        )
        assert found.special == {0, 1, 2, 7, 8, 9}

    @pytest.mark.parametrize("odd", [None, -1, "2", 2.0, True, LARGEST_VOCABULARY, [[3]], {"a": 1}])
    def test_what_is_no_id_is_none(self, tmp_path, odd):
        assert facts(tmp_path, eos_token_id=odd, pad_token_id=odd, image_token_id=odd).special == {1}


class TestSizes:
    def test_they_may_be_the_text_s_and_have_other_names(self, tmp_path):
        bare = {"vocab_size": None, "max_position_embeddings": None}
        assert facts(tmp_path, **bare, text_config={"vocab_size": 11, "n_positions": 4}).vocabulary == 11
        assert facts(tmp_path, **bare, text_config={"vocab_size": 11, "n_positions": 4}).positions == 4
        assert facts(tmp_path, vocab_size=12, text_config={"vocab_size": 11}).vocabulary == 11  # as in PaliGemma

    def test_the_class_has_defaults_for_what_no_file_spells_out(self, tmp_path):
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = Facts.read(tmp_path, config)
        assert (found.vocabulary, found.positions) == (50257, 1024)

    @pytest.mark.parametrize("size", [0, -3, "10", 1.5, True])
    def test_what_is_no_size_is_none(self, tmp_path, size):
        found = facts(tmp_path, vocab_size=size, max_position_embeddings=size)
        assert (found.vocabulary, found.positions) == (None, None)
        assert found.clip(10**6) == 10**6

    def test_mpt_s_longest_text_has_a_name_of_its_own(self, tmp_path):
        assert facts(tmp_path, max_position_embeddings=None, max_seq_len=64).positions == 64

    def test_a_length_is_cut_to_the_positions(self, tmp_path):
        assert [facts(tmp_path).clip(length) for length in (5, 6, 7)] == [5, 6, 6]


@pytest.mark.parametrize(
    ("config", "writes"),
    [
        ({}, True),
        ({"bos_token_id": 10}, False),
        ({"bos_token_id": 10, "vocab_size": None}, True),
        ({"bos_token_id": None}, False),
        ({"architectures": ["BertForMaskedLM"]}, False),
    ],
)
def test_a_model_writes_from_a_token_that_it_has(tmp_path, config, writes):
    assert facts(tmp_path, **config).writes is writes


class TestRequired:
    def test_a_vocabulary(self, tmp_path):
        assert facts(tmp_path).require_vocabulary() == 10
        assert facts(tmp_path, vocab_size=LARGEST_VOCABULARY).require_vocabulary() == LARGEST_VOCABULARY
        with pytest.raises(CalibrationError, match=r"config\.json: no vocab_size .* calibrate on a text file"):
            facts(tmp_path, vocab_size=None).require_vocabulary()
        with pytest.raises(CalibrationError, match="vocab_size is 16777217, at most 16777216 are drawn from"):
            facts(tmp_path, vocab_size=LARGEST_VOCABULARY + 1).require_vocabulary()

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"architectures": ["BertForMaskedLM"]}, "`self` needs a causal language model .* found BertForMaskedLM"),
            ({"bos_token_id": None}, "`self` needs a token to start from"),
            ({"bos_token_id": 10}, "the token to start from has id 10, but vocab_size is 10; correct bos_token_id"),
        ],
    )
    def test_a_start(self, tmp_path, config, message):
        assert facts(tmp_path).require_start() == 1
        with pytest.raises(CalibrationError, match=rf"config\.json: {message}.* on `random` instead of `self`"):
            facts(tmp_path, **config).require_start()


def test_a_configuration_that_breaks_its_class_has_no_sizes(tmp_path):
    directory = make_checkpoint(tmp_path / "m")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    assert Facts.read(directory, {"model_type": "llama", "hidden_size": "wide"}).vocabulary is None
