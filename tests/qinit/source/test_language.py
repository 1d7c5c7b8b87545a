import pytest
import transformers
from accelerate import init_empty_weights

from qinit.source.language import language_part
from tests.models import CONVERTED, FAMILIES, OTHERS, SMALL_LAYERS

TOWER = {**SMALL_LAYERS, "vocab_size": 64}
TOWERS = ("CLIPConfig", "CLIPModel", {"text_config": TOWER, "vision_config": {**SMALL_LAYERS, "image_size": 16}})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (CONVERTED["llava"], "model.language_model"),
        (FAMILIES["llama"], ""),
        (OTHERS["bert"], ""),
        (OTHERS["t5"], ""),
        (TOWERS, ""),
    ],
)
def test_it_is_the_decoder_beside_what_sees(kind, expected):
    config, model, values = kind
    with init_empty_weights(include_buffers=True):
        assert language_part(getattr(transformers, model)(getattr(transformers, config)(**values))) == expected


def test_code_that_is_made_otherwise_has_none():
    class Odd:
        config = type("Config", (), {})()

        def get_output_embeddings(self):
            return 1

    assert language_part(Odd()) == ""
