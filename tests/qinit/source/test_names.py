import sys

import pytest
import torch

from qinit.files.tensors import StoredTensor
from qinit.source.checkpoint import Checkpoint
from qinit.source.skeleton import loader
from qinit.source.targets import read_architecture
from tests.helpers import edit_config, edit_tensors
from tests.models import CONVERTED, make_float32

EXPERTS = "model.layers.1.mlp.experts"


def names_of(directory):
    checkpoint = Checkpoint.open(directory)
    return read_architecture(checkpoint).names_in(checkpoint)


def loaded(directory):
    return loader(Checkpoint.open(directory).config).from_pretrained(directory).state_dict()


def value(names, parameter):
    stored = names.find(parameter)
    return names.make(parameter, StoredTensor.read) if stored is None else stored.read()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", *CONVERTED])
def test_every_parameter_is_what_the_stock_loader_makes_of_the_same_tensors(family, tmp_path):
    directory = make_float32(tmp_path, family)
    names = names_of(directory)
    for parameter, expected in loaded(directory).items():
        assert torch.equal(value(names, parameter), expected), parameter


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("saved", "read"), [("GPT2Model", "GPT2LMHeadModel"), ("GPT2LMHeadModel", "GPT2Model")])
def test_the_base_model_s_prefix_may_be_missing_or_too_much(saved, read, old, tmp_path, monkeypatch):
    directory = make_float32(tmp_path, "gpt2", model_class=saved)
    edit_config(directory, architectures=[read])
    expected = loaded(directory)
    if old:  # transformers 4 has no conversions
        monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    names = names_of(directory)
    for parameter in expected.keys() - {"lm_head.weight"}:
        assert torch.equal(names.find(parameter).read(), expected[parameter])
    assert names.prefix(next(p for p in expected if "c_attn" in p).rpartition(".")[0]).startswith(
        "h." if saved == "GPT2Model" else "transformer.h."
    )


def test_of_two_tensors_for_one_parameter_the_loader_s_is_taken(tmp_path):
    directory = make_float32(tmp_path, "gpt2")
    full = "transformer.h.0.mlp.c_fc.weight"
    edit_tensors(directory / "model.safetensors", lambda t: t.update({full[12:]: torch.ones_like(t[full])}))
    assert torch.equal(names_of(directory).find(full).read(), loaded(directory)[full])


def test_what_experts_are_made_of(tmp_path):
    directory = make_float32(tmp_path, "mixtral")
    names, parameters = names_of(directory), loaded(directory)
    for which, count in (("gate_up_proj", 8), ("down_proj", 4)):
        parameter = f"{EXPERTS}.{which}"
        parts = names.parts_of(parameter)
        assert len(parts) == count
        assert {names.parameter_of[part.name] for part in parts} == {parameter}
        assert torch.equal(names.make(parameter, StoredTensor.read), parameters[parameter])
    assert [part.name for part in names.parts_of("model.embed_tokens.weight")] == ["model.embed_tokens.weight"]
    assert names.parts_of("nothing") == []


def test_what_is_cut_out_of_a_tensor_has_no_tensor_of_its_own(tmp_path):
    names = names_of(make_float32(tmp_path, "dinov2"))
    gate, up = (f"dinov2.encoder.layer.0.mlp.{which}.weight" for which in ("gate_proj", "up_proj"))
    assert names.find(gate) is None
    assert names.made_of(gate) == names.made_of(up) != []
    assert names.made_of("classifier.weight") == names.made_of("nothing") == []
    assert names.make("classifier.weight", StoredTensor.read) is None


def test_packed_tensors_arrive_where_the_weight_they_replace_would(tmp_path):
    names = names_of(make_float32(tmp_path, "llava"))
    module = "model.language_model.layers.0.mlp.up_proj"
    prefix = names.prefix(module)
    assert prefix == "language_model.model.layers.0.mlp.up_proj."
    assert all(names.arrives(prefix + part, f"{module}.{part}") for part in ("weight", "qweight", "g_idx"))
    assert not names.arrives("elsewhere.qweight", f"{module}.qweight")
    assert names.prefix("nothing") == "nothing."
