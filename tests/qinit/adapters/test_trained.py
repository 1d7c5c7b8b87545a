import shutil
from pathlib import Path

import pytest
import torch

from qinit.adapters.trained import misfits, read_trained
from qinit.errors import CheckpointError
from qinit.files.tensors import read_header
from qinit.report.report import Report
from tests.helpers import edit_json, edit_tensors

WEIGHTS = "adapter_model.safetensors"
UP = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.fixture
def adapter(finished, tmp_path):
    """A copy of a run's adapter, to change as a trainer might."""
    return Path(shutil.copytree(finished / "eqft_init", tmp_path / "adapter"))


def found(adapter, run):
    base = [name for file in run.glob("*.safetensors") for name in read_header(file)]
    return [*misfits(adapter, {row.name: row.shape for row in Report.read(run).layers}, base)]


def test_one_that_was_trained_on_the_run_fits_with_other_ranks_too_and_a_head_of_its_own(adapter, finished):
    def change(tensors):
        tensors[f"{UP}.lora_A.weight"], tensors[f"{UP}.lora_B.weight"] = torch.ones(3, 64), torch.ones(128, 3)
        tensors["base_model.model.lm_head.weight"] = torch.ones(256, 64)

    edit_tensors(adapter / WEIGHTS, change)
    assert found(adapter, finished) == []


def test_other_shapes_other_modules_and_half_a_pair_are_named(adapter, finished):
    def change(tensors):
        tensors[f"{UP}.lora_A.weight"] = torch.ones(4, 32)
        tensors[f"{UP.replace('layers.1', 'layers.7')}.lora_A.weight"] = torch.ones(8, 64)
        del tensors[f"{UP.replace('up', 'down')}.lora_B.weight"]

    edit_tensors(adapter / WEIGHTS, change)
    assert found(adapter, finished) == [
        "model.layers.1.mlp.down_proj is 64 x 128, and has [4, 128]",
        "model.layers.1.mlp.up_proj is 128 x 64, and has [4, 32], [128, 4]",
        "model.layers.7.mlp.up_proj is no module of the base",
    ]


def test_a_directory_that_holds_none_says_what_there_is(adapter, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copytree(adapter, tmp_path / "out/checkpoint-30")
    with pytest.raises(CheckpointError, match=r"not found; an adapter's directory has one, as checkpoint-30 below it"):
        read_trained(tmp_path / "out")
    edit_json(adapter / "adapter_config.json", lambda config: config.update(megatron_config={"a": 1}))
    with pytest.raises(CheckpointError, match="PEFT would import what that names"):
        read_trained(adapter)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="save it again as safetensors: the pickle there can run code"):
        read_trained(adapter)
