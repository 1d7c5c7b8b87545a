import json
import shutil
from pathlib import Path

import pytest
import torch

import qinit
from qinit.errors import CheckpointError, RecipeError
from tests.mixed import mixed_plan, write
from tests.stock import dense_weight, lora_modules, solved


@pytest.fixture(scope="module")
def dense(llama, tmp_path_factory):
    return write(mixed_plan(llama, "dense"), tmp_path_factory.mktemp("dense") / "out")


@pytest.fixture
def copied(dense, tmp_path):
    """A run's directory to damage."""
    return Path(shutil.copytree(dense, tmp_path / "out"))


def test_dense_loads_with_its_adapter_whatever_the_widths(llama, dense):
    model = qinit.load(dense)
    solution = solved(mixed_plan(llama, "dense"))
    for name, module in lora_modules(model).items():
        assert torch.equal(dense_weight(module.base_layer), solution[name][1])
    assert model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    trainable = [name for name, p in qinit.load(str(dense), trainable=True).named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_the_device_is_where_everything_goes(dense):
    assert {p.device.type for p in qinit.load(dense, device="cpu").parameters()} == {"cpu"}
    with pytest.raises(RecipeError, match="no 'cuda:99' here"):
        qinit.load(dense, device="cuda:99")


class TestErrors:
    def test_no_such_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"nothing: no such directory"):
            qinit.load(tmp_path / "nothing")

    def test_a_directory_that_is_not_qinit_s(self, llama):
        with pytest.raises(CheckpointError, match=r"qinit.json: not found; qinit.load reads directories that qinit"):
            qinit.load(llama)

    @pytest.mark.parametrize("report", [{}, {"source": 1}, {"source": {"class": None}}])
    def test_a_qinit_json_of_something_else(self, copied, report):
        (copied / "qinit.json").write_text(json.dumps(report))
        with pytest.raises(CheckpointError, match="names no model class"):
            qinit.load(copied)

    def test_a_class_that_transformers_lacks(self, copied):
        (copied / "qinit.json").write_text('{"source": {"class": "NoSuchModel"}}')
        with pytest.raises(CheckpointError, match=r"transformers .* has no NoSuchModel"):
            qinit.load(copied)

    @pytest.mark.parametrize("changes", [{"peft_type": "IA3"}, {"megatron_config": {"a": 1}, "megatron_core": "own"}])
    def test_an_adapter_that_qinit_did_not_write(self, copied, changes):
        file = copied / "eqft_init/adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(CheckpointError, match=r"adapter_config.json: not an adapter that qinit wrote"):
            qinit.load(copied)

    @pytest.mark.parametrize("value", [5, [], {"dynamic": [1]}, {"dynamic": {"a": {"bits": 3}}}])
    def test_a_quantization_that_qinit_did_not_write(self, copied, value):
        file = copied / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": value}))
        with pytest.raises(CheckpointError, match="its quantization_config is not what qinit writes"):
            qinit.load(copied)

    def test_an_adapter_beside_the_base_leads_nowhere(self, copied, llama):
        (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(llama)}))
        with pytest.raises(CheckpointError, match="transformers would load the model that it names instead"):
            qinit.load(copied)

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_an_adapter_that_is_not_there(self, copied, name):
        (copied / "eqft_init" / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name}: not found; load the base alone with adapter=False"):
            qinit.load(copied)
        assert qinit.load(copied, adapter=False) is not None

    @pytest.mark.parametrize("missing", [{"gptqmodel"}, {"optimum"}, {"gptqmodel", "optimum"}])
    def test_packages_that_are_not_installed(self, copied, monkeypatch, missing):
        config = json.loads((copied / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 2}
        (copied / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(
            "qinit.formats.gptq.loading.find_spec", lambda package: None if package in missing else object()
        )
        with pytest.raises(CheckpointError) as caught:
            qinit.load(copied)
        assert f"needs {' and '.join(sorted(missing))}; " in str(caught.value)
        assert str(caught.value).endswith('pip install "gptqmodel>=7.6,<7.7" "optimum>=2.3"')

    def test_weights_that_are_missing_are_not_made_up(self, copied):
        import safetensors.torch

        file = copied / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lacks 1 weights .* \(model.layers.0.mlp.up_proj.weight\)"):
            qinit.load(copied)

    def test_a_damaged_adapter(self, copied):
        (copied / "eqft_init/adapter_model.safetensors").write_bytes(b"x" * 100)
        with pytest.raises(CheckpointError, match=r"eqft_init: the adapter cannot be loaded"):
            qinit.load(copied)

    def test_damaged_weights(self, copied):
        (copied / "model.safetensors").write_bytes(b"x" * 100)
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            qinit.load(copied)
