import pytest

from qinit.formats import FORMATS, format_of

GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        (None, "dense"),
        (GPTQ, "gptq"),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
        ({"quant_method": "awq"}, None),
        ({}, None),
        ("gptq", None),
    ],
)
def test_a_base_is_recognised_by_its_configuration(quantization, name):
    found = format_of({"quantization_config": quantization})
    assert found is (FORMATS[name] if name else None)


def test_a_configuration_without_a_word_on_it_is_dense():
    assert format_of({"model_type": "llama"}) is FORMATS["dense"]


def test_only_version_2_of_gptq_is_read_layer_by_layer():
    gptq = FORMATS["gptq"]
    assert gptq.cannot_read({"quantization_config": {**GPTQ, "checkpoint_format": "gptq_v2"}}) is None
    for version in ({}, {"checkpoint_format": "gptq"}, {"checkpoint_format": "marlin"}):
        reason = gptq.cannot_read({"quantization_config": {**GPTQ, **version}})
        assert reason.endswith("and gptq_v2 alone is read")


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_what_packs_says_what_loads_it(fmt):
    assert fmt.title
    assert bool(fmt.parts) == bool(fmt.packages) == (not fmt.mixed_bits)
    assert bool(fmt.mixed_loaders) == bool(fmt.mixed_note) == (not fmt.mixed_bits)


def test_the_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("qinit.formats.base.find_spec", lambda name: None if name == "optimum" else object())
    assert FORMATS["gptq"].missing_packages() == ["optimum"]
    assert FORMATS["dense"].missing_packages() == []
