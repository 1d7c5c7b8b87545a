import shutil

import torch

from qinit.verification.findings import Finding
from qinit.verification.trained import check_trained
from tests.helpers import edit_tensors


def test_values_that_are_not_finite_and_modules_that_the_base_lacks_are_found(finished, tmp_path):
    adapter = shutil.copytree(finished / "eqft_init", tmp_path / "trained")
    assert [each for each in check_trained(finished, adapter) if isinstance(each, Finding)] == []
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"

    def change(tensors):
        tensors[name][0, 0] = torch.nan
        tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()

    edit_tensors(adapter / "adapter_model.safetensors", change)
    found = [each.what for each in check_trained(finished, adapter) if isinstance(each, Finding)]
    assert found[0] == "model.layers.9.mlp.up_proj is no module of the base"
    assert found[1] == f"tensor '{name}' holds 1 NaN or Inf among 256 values"
