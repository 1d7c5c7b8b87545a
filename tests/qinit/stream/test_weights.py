import pytest
import torch

from qinit.adapters.reading import SavedAdapter
from qinit.errors import CheckpointError
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import read_architecture
from qinit.stream.weights import ModelWeights
from tests.evaluated import make_run
from tests.models import make_checkpoint
from tests.stock import delta, dense_weight, load, load_base, lora_modules

CPU = torch.device("cpu")


def weights_of(directory, adapter=None):
    checkpoint = Checkpoint.open(directory, quantized=True)
    return ModelWeights(checkpoint, read_architecture(checkpoint), adapter=adapter)


def test_a_dense_checkpoint_s_parameters_by_the_model_s_names_in_float32(tiny_llama):
    found = weights_of(tiny_llama)
    for name, parameter in load_base(tiny_llama).named_parameters():
        assert found.has(name)
        assert torch.equal(found.read(name, CPU), parameter)
    assert not found.has("model.layers.9.mlp.up_proj.weight")
    assert found.read("model.layers.9.mlp.up_proj.weight", CPU) is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_layers_are_unpacked_and_the_adapter_is_added_in_the_module_s_layout(family, tmp_path):
    pytest.importorskip("gptqmodel", reason="pip install 'qinit[gptq]'")
    directory = make_run(make_checkpoint(tmp_path / "m", family, "float32"), tmp_path / "run", lora_alpha=9)
    alone, both = weights_of(directory), weights_of(directory, SavedAdapter.open(directory / "eqft_init"))
    for name, module in lora_modules(load(directory)).items():
        base, repaired = (each.read(f"{name}.weight", CPU) for each in (alone, both))
        if family == "gpt2":
            base, repaired = base.T, repaired.T
        assert torch.equal(base, dense_weight(module.base_layer))
        torch.testing.assert_close(repaired, base + delta(module))
        assert alone.has(f"{name}.weight")


def test_a_head_of_another_name(tmp_path):
    import transformers

    config = transformers.GPTNeoXConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert torch.equal(weights_of(tmp_path).read("lm_head.weight", CPU), model.get_output_embeddings().weight)


def test_what_is_no_number_is_named(tiny_llama):
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, tiny_llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' holds 1 NaN or Inf"):
        weights_of(tiny_llama).read("model.norm.weight", CPU)


def test_what_is_announced_are_the_bytes_of_a_block(tiny_llama, monkeypatch):
    told = []
    monkeypatch.setattr("os.posix_fadvise", lambda _, offset, size, advice: told.append((offset, size)))
    found = weights_of(tiny_llama)
    found.announce("model.layers.1.")
    tensors = found.checkpoint.tensors.values()
    inside = [(each.offset, each.nbytes) for each in tensors if each.name.startswith("model.layers.1.")]
    assert sorted(told) == sorted(inside)
    assert inside
