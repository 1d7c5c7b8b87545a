import json
import shutil
import sys
from pathlib import Path

import pytest

from qinit.errors import CheckpointError
from qinit.trial.names import LoadingInfo, lost_names
from tests.helpers import edit_json, edit_tensors, quantize
from tests.models import make_checkpoint

ADAPTER = "eqft_init"
WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A masked LM's source, and its run in both formats, not to be changed."""
    place = tmp_path_factory.mktemp("made")
    source = make_checkpoint(place / "source", "bert", hidden_size=64)
    for form in ("dense", "gptq"):
        quantize(source, place / form, format=form)
    return place


@pytest.fixture(params=["dense", "gptq"])
def run(request, made, tmp_path):
    return Path(shutil.copytree(made / request.param, tmp_path / "run"))


def lost(run, source=None, class_name=None):
    return lost_names(run, run / ADAPTER, source, class_name)


def test_everything_of_a_run_is_found_in_both_formats_without_what_unpacks_it(run, made):
    before = set(sys.modules)
    assert lost(run, made / "source") == lost(run) == []
    assert not [name for name in set(sys.modules) - before if name.startswith(("gptqmodel", "optimum"))]


def test_a_class_without_the_head_loses_every_factor(run):
    found = lost(run, class_name="BertModel")
    assert any(each.startswith("PEFT drops base_model.model.bert.") and each.endswith(" more") for each in found)


def test_a_tensor_of_the_base_that_goes_is_missed(run, made):
    edit_tensors(run / "model.safetensors", lambda tensors: tensors.pop("bert.embeddings.LayerNorm.bias"))
    said = "BertForMaskedLM finds nothing for bert.embeddings.LayerNorm.bias, which stay random"
    assert lost(run, made / "source") == lost(run) == [said]


def test_what_the_source_lacks_too_is_not_missed(run, made, tmp_path):
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))
    for file in (run / "model.safetensors", source / "model.safetensors"):
        edit_tensors(file, lambda tensors: tensors.pop("bert.embeddings.LayerNorm.bias"))
    assert lost(run, source) == []


def test_factors_that_go_and_factors_that_nobody_takes_are_named(run):
    name = "base_model.model.bert.encoder.layer.0.output.dense.lora_B.weight"

    def rename(tensors):
        tensors[name.replace("layer.0", "layer.9")] = tensors.pop(name)

    edit_tensors(run / WEIGHTS, rename)
    first, second = lost(run)
    assert first == f"PEFT drops {name.replace('layer.0', 'layer.9')}"
    assert second == f"PEFT finds nothing for {name}, which start at random"


def test_a_configuration_that_peft_refuses_is_an_error_and_what_it_warns_of_is_said(run):
    edit_json(run / ADAPTER / "adapter_config.json", lambda config: config.update(rank_pattern={"nothing": 3}))
    assert [each for each in lost(run) if each.startswith("PEFT warns: The following rank_pattern keys")]
    edit_json(run / ADAPTER / "adapter_config.json", lambda config: config.update(target_modules=["nothing"]))
    with pytest.raises(CheckpointError, match=r"eqft_init: PEFT cannot load it \(\w+: Target modules"):
        lost(run)


def test_a_layer_that_is_packed_but_no_linear_one_of_the_model_is_counted(made, tmp_path):
    run = Path(shutil.copytree(made / "gptq", tmp_path / "run"))

    def add(tensors):
        tensors["bert.other.qweight"] = tensors["bert.encoder.layer.0.output.dense.qweight"].clone()

    edit_tensors(run / "model.safetensors", add)
    assert lost(run)[0].startswith("BertForMaskedLM has ")


def test_loading_info_is_taken_as_transformers_gives_it():
    info = LoadingInfo.of({"missing_keys": {"a"}, "unexpected_keys": ["b"], "mismatched_keys": {("c", (1,), (2,))}})
    assert json.dumps([sorted(each) for each in (info.missing, info.unexpected, info.mismatched)]) == (
        '[["a"], ["b"], ["c"]]'
    )
    assert [*info.problems("M")] == [
        *("M finds nothing for a, which stay random", "M passes over b", "M wants c, in another shape")
    ]
    assert not info.beyond(info)
