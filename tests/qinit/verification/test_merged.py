import shutil
from pathlib import Path

import pytest
import torch

from qinit.errors import CheckpointError, ReportError
from qinit.files.manifest import write_manifest
from qinit.merge.plan import plan_merge
from qinit.merge.run import merge
from qinit.verification.findings import Checked, Finding
from qinit.verification.merged import verify_merged
from tests.helpers import edit_config, edit_json, edit_tensors
from tests.peft_adapters import make_adapter

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    return make_adapter(finished, tmp_path_factory.mktemp("trained"), target_modules=["down_proj"], use_dora=True)


@pytest.fixture(scope="module")
def whole(finished, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    list(merge(plan_merge(finished, trained), out))
    return out


@pytest.fixture
def out(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "out"))


def found(*arguments):
    return [str(each) for each in verify_merged(*arguments) if isinstance(each, Finding)]


def test_a_sound_one_is_found_sound_alone_and_with_what_it_was_made_from(whole, finished, trained):
    assert found(whole) == []
    events = list(verify_merged(whole, finished, trained))
    assert not [each for each in events if isinstance(each, Finding)]
    assert [each.name for each in events if isinstance(each, Checked) and each.kind == "layer"] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)
    ]


def test_other_values_than_those_of_the_run_and_the_adapter_are_named(out, finished, trained):
    edit_tensors(out / "model.safetensors", lambda tensors: tensors[DOWN].mul_(1.02))
    assert "model.safetensors: has changed since it was written" in found(out)[0]
    write_manifest(out)
    assert found(out) == []  # it is finite and has the right shape
    (problem,) = found(out, finished, trained)
    assert f"tensor '{DOWN}' is not Q + s B A: " in problem
    assert "a relative distance of 2.0e-02" in problem


def test_another_adapter_is_known_by_its_sum_and_by_every_value(whole, finished):
    first, *others = found(whole, finished)  # with the run's own
    assert "qinit.json: adapter: sha256, which is of another adapter" in first
    assert len(others) == 14


def test_values_that_are_not_finite_names_and_shapes(out, finished, trained):
    def change(tensors):
        tensors[DOWN][0, 0] = torch.nan
        tensors["model.extra"] = torch.ones(2)

    edit_tensors(out / "model.safetensors", change)
    edit_config(out, rope_theta=1.0)
    write_manifest(out)
    text = "\n".join(found(out, finished, trained))
    assert "totals: tensors: expected 22, found 21" in text
    assert "LlamaForCausalLM passes over model.extra" in text
    assert "config.json: differs from the run's: rope_theta" in text
    assert "tensor 'model.extra' is none of the run's" in text
    assert f"tensor '{DOWN}' holds 1 NaN or Inf" in "\n".join(found(out))
    edit_tensors(out / "model.safetensors", lambda tensors: tensors.pop(DOWN))
    write_manifest(out)
    assert f"finds nothing for {DOWN}" in "\n".join(found(out))


def test_what_is_none_is_an_error(out, finished, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        found(out, finished, tmp_path / "gone")
    edit_json(out / "qinit.json", lambda report: report.pop("merged"))
    with pytest.raises(ReportError, match=r"qinit.json: not the report of a merge \(merged: "):
        found(out)
