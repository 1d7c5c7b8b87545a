import pytest

from qinit.errors import OutputError
from qinit.runner import layer as layer_module
from qinit.workplace.place import kept, partial_of
from tests.broken_off import RANDOM, TEXT, Crash, break_off, finish
from tests.helpers import names


def test_what_the_model_wrote_is_worth_keeping_and_random_tokens_are_not(strong_llama, place, monkeypatch):
    def crash(*_, **__):
        raise Crash

    monkeypatch.setattr(layer_module, "solve", crash)
    for options, words in ((TEXT, "the text that the model wrote is kept"), (RANDOM, "")):
        with pytest.raises(Crash):
            finish(strong_llama, place / options["calibration"], **options)
        assert kept(place / options["calibration"]).startswith(words)
    assert names(place) == [".self.partial"]


def test_a_damaged_text_is_an_error(strong_llama, place):
    break_off(strong_llama, place / "out", 9, **TEXT)
    file = partial_of(place / "out") / "samples.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(OutputError, match=r"samples\.safetensors: damaged, .* remove .*partial to start anew"):
        finish(strong_llama, place / "out", **TEXT)
