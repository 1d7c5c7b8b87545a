import torch
import transformers

from qinit.stock.inputs import TOKENS, possible_inputs
from tests.models import make_checkpoint


def first(model, directory):
    return next(possible_inputs(model, directory))


def test_text_has_no_special_tokens_and_is_the_same_each_time(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    inputs = first(model, llama)
    assert inputs["input_ids"].shape == (1, TOKENS)
    assert inputs["input_ids"].min() > 2
    assert torch.equal(inputs["input_ids"], first(model, llama)["input_ids"])


def test_an_encoder_decoder_reads_on_both_sides(tmp_path):
    directory = make_checkpoint(tmp_path / "t5", "t5")
    model = transformers.T5ForConditionalGeneration.from_pretrained(directory)
    assert first(model, directory).keys() == {"input_ids", "decoder_input_ids"}


def test_what_sees_gets_a_picture_and_what_hears_a_sound_of_the_size_that_it_takes(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sees = transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=16, patch_size=8))
    hears = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
            **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64},
            **{"max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8, "pad_token_id": 0},
            **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        )
    )
    for model, name, shape in ((sees, "pixel_values", (1, 3, 16, 16)), (hears, "input_features", (1, 8, 40))):
        model.save_pretrained(tmp_path / name)
        inputs = first(model, tmp_path / name)
        assert inputs[name].shape == shape
        model(**inputs)
