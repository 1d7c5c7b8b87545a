import pytest
import torch
import transformers

from qinit.stream.feeding import inputs_of, reads_twice
from tests.models import FAMILIES, OTHERS

TOKENS, MASK = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])


def model_of(family, name=None):
    config, model, values = {**FAMILIES, **OTHERS}[family]
    return getattr(transformers, name or model)(getattr(transformers, config)(**values))


@pytest.mark.parametrize(("family", "start"), [("t5", 0), ("bart", 2)])
def test_a_decoder_writes_what_the_encoder_reads_one_token_after_the_other(family, start):
    model = model_of(family)
    assert reads_twice(model)
    inputs = inputs_of(model, TOKENS, MASK)
    assert torch.equal(inputs["input_ids"], TOKENS)
    assert inputs["attention_mask"] is inputs["decoder_attention_mask"] is MASK
    assert inputs["decoder_input_ids"].tolist() == [[start, 5, 6], [start, 8, 9]]
    assert torch.equal(inputs["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(labels=TOKENS))


@pytest.mark.parametrize(("family", "name"), [("llama", None), ("bert", None), ("t5", "T5EncoderModel")])
def test_all_others_read_the_text_alone(family, name):
    model = model_of(family, name)
    assert not reads_twice(model)
    assert inputs_of(model, TOKENS, None) == {"input_ids": TOKENS, "attention_mask": None}
