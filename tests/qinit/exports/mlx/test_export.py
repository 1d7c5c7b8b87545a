import json

import torch
from safetensors.torch import load_file

from qinit.exports import FinishedRun
from qinit.exports.write import export
from tests.helpers import quantize
from tests.models import make_checkpoint


def test_names_widths_and_the_adapter(tmp_path):
    quantize(make_checkpoint(tmp_path / "source"), tmp_path / "run", bits=3, group_size=64)
    run = FinishedRun.open(tmp_path / "run")
    export(run, "mlx", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 3}
    assert "rope_theta" in config
    assert "quantization_config" not in config
    name = "model.layers.0.mlp.up_proj"
    base = load_file(tmp_path / "out/model.safetensors")
    assert base[f"{name}.weight"].dtype == torch.uint32
    assert base["model.norm.weight"].dtype == torch.float16
    factors = load_file(tmp_path / "out/adapters/adapters.safetensors")
    settings = json.loads((tmp_path / "out/adapters/adapter_config.json").read_text())
    found = settings["lora_parameters"]["scale"] * (factors[f"{name}.lora_a"] @ factors[f"{name}.lora_b"]).T
    torch.testing.assert_close(found, run.adapter.change(name, torch.device("cpu")))
