import json

import pytest
import torch
from safetensors.torch import load_file

from qinit.exports import EXPORTS, FinishedRun
from qinit.exports.write import export
from qinit.source.checkpoint import Checkpoint
from tests.helpers import quantize
from tests.models import make_checkpoint

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def source(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "source", request.param, "float32")


def logits(directory):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, directory, subfolder="eqft_init")
    with torch.no_grad():
        return model(input_ids=IDS).logits


def weights_of_base(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3}, {"target_bits": 3.0, "allocation": "random"}])
def test_a_packed_run_becomes_what_its_loader_computes_with(source, tmp_path, options):
    if source.parent.name.startswith("gpt2"):
        options = {**options, "target_modules": "c_attn,c_fc"}
    quantize(source, tmp_path / "run", format="gptq", **options)
    run = FinishedRun.open(tmp_path / "run")
    assert EXPORTS["dense"].loses(run) is None
    export(run, "dense", tmp_path / "out")
    before, after = weights_of_base(source), weights_of_base(tmp_path / "out")
    assert after.keys() == before.keys()
    names = run.architecture.names_in(Checkpoint.open(tmp_path / "out"))
    for row in run.report.layers:
        name = names.prefix(row.name) + "weight"
        assert after[name].shape == before[name].shape
        if row.kept is None:
            assert torch.equal(after[name], run.weights.read(f"{row.name}.weight", torch.device("cpu")))
            lost = float((after[name] - before[name]).norm() / before[name].norm())
            assert lost == pytest.approx(row.error_start, rel=2e-3)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    named = json.loads((tmp_path / "out/eqft_init/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((tmp_path / "out").resolve())
    if "bits" not in options:  # stored dense, layers would get other widths
        return
    quantize(source, tmp_path / "dense", format="dense", **options)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "dense"), rtol=1e-2, atol=1e-3)


def test_a_dense_run_is_copied_and_what_is_rounded_is_said(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    quantize(source, tmp_path / "run", format="dense", max_shard_size="60KB")
    run = FinishedRun.open(tmp_path / "run")
    assert EXPORTS["dense"].loses(run) is None
    export(run, "dense", tmp_path / "out")
    after = weights_of_base(tmp_path / "out")
    for file in (tmp_path / "run").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(after[name], tensor)
    quantize(source, tmp_path / "packed")
    assert EXPORTS["dense"].loses(FinishedRun.open(tmp_path / "packed")).endswith("become bfloat16, as the rest is")
