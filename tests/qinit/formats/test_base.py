import pytest

from qinit.formats import FORMATS, format_of

GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        (None, "dense"),
        (GPTQ, "gptq"),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "hqq"}, None),
        ({}, None),
        ("gptq", None),
    ],
)
def test_a_base_is_recognised_by_its_configuration(quantization, name):
    found = format_of({"quantization_config": quantization})
    assert (found and found.name) == name


def test_a_configuration_without_a_word_on_it_is_dense():
    assert format_of({"model_type": "llama"}) is FORMATS["dense"]


@pytest.mark.parametrize("more", [{}, {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}])
def test_both_versions_of_gptq_are_read_layer_by_layer(more):
    assert FORMATS["gptq"].cannot_read({"quantization_config": {**GPTQ, **more}}) is None


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_what_packs_says_what_loads_it(fmt):
    assert fmt.title
    assert bool(fmt.parts) == bool(fmt.packages) == (not fmt.mixed_bits)
    assert bool(fmt.mixed_loaders) == bool(fmt.mixed_note) == (not fmt.mixed_bits)


def test_the_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("qinit.formats.reader.find_spec", lambda name: None if name == "optimum" else object())
    assert FORMATS["gptq"].missing_packages() == ["optimum"]
    assert FORMATS["dense"].missing_packages() == []
