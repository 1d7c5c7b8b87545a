import pytest
import torch
from transformers import AutoModel

from qinit.errors import CheckpointError
from qinit.source.checkpoint import Checkpoint
from qinit.source.skeleton import build_model, loader, own_code
from qinit.source.targets import read_architecture
from tests.helpers import edit_config
from tests.models import make_checkpoint
from tests.qinit.source.test_targets import targets_of


@pytest.mark.parametrize("architectures", [None, ["NotAClass"], ["PretrainedConfig"]])
def test_without_a_known_class_the_causal_model_of_the_type_is_taken(tiny_llama, architectures):
    edit_config(tiny_llama, architectures=architectures)
    architecture = read_architecture(Checkpoint.open(tiny_llama))
    assert architecture.class_name == "LlamaForCausalLM"


def test_building_the_architecture_takes_no_memory_for_weights(tiny_llama):
    edit_config(tiny_llama, hidden_size=1 << 20, intermediate_size=1 << 22)  # some 40 TB of weights
    architecture = read_architecture(Checkpoint.open(tiny_llama))
    assert architecture.linear[-1].in_features == 1 << 22


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_weights_get_no_first_values_and_buffers_keep_theirs(family, tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "model", family)
    expected = dict(AutoModel.from_pretrained(source).named_buffers())
    for draw in ("normal_", "uniform_"):
        monkeypatch.setattr(f"torch.Tensor.{draw}", None)  # PyTorch would take a millisecond for each
    model = build_model(Checkpoint.open(source), include_buffers=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    found = {name.removeprefix(f"{model.base_model_prefix}."): buffer for name, buffer in model.named_buffers()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_code_in_a_checkpoint_is_never_run_nor_asked_about(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (tiny_llama / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit_config(tiny_llama, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    with pytest.raises(CheckpointError, match="needs code that the checkpoint brings"):
        targets_of(tiny_llama)
    assert not (tmp_path / "ran").exists()


def test_more_modules_than_the_tensors_can_be_of_are_not_built(tiny_llama, monkeypatch):
    monkeypatch.setattr("qinit.source.skeleton.FEW_MODULES", 20)
    monkeypatch.setattr("qinit.source.skeleton.MODULES_PER_TENSOR", 1)
    with pytest.raises(CheckpointError, match="describes more than 21 modules, but the checkpoint holds 21 tensors"):
        targets_of(tiny_llama)


def test_the_bounds_leave_no_hook_behind(tiny_llama):
    from torch.nn.modules import module

    targets_of(tiny_llama)
    assert not module._global_module_registration_hooks
    assert not module._global_buffer_registration_hooks


def build(directory, **options):
    return build_model(Checkpoint.open(directory), **{"include_buffers": True, **options})


def test_the_model_is_there_but_for_its_numbers(llama):
    model = build(llama)
    assert type(model).__name__ == "LlamaForCausalLM"
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {name: tensor.shape for name, tensor in Checkpoint.open(llama).tensors.items()}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.buffers())
    real = build(llama, include_buffers=False)
    assert all(parameter.is_meta for parameter in real.parameters())
    assert list(real.buffers())
    assert not any(buffer.is_meta for buffer in real.buffers())  # rotary frequencies are in no checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1001}, "num_hidden_layers is 1001, but the checkpoint holds 21 tensors"),
        ({"vision_config": {"depth": 10**9}}, r"vision_config\.depth is 1000000000, but"),
        ({"parts": [{"n_layers": 5000}]}, r"parts\.n_layers is 5000, but"),
        ({"max_position_embeddings": 2**24 + 1}, "max_position_embeddings is 16777217, at most 16777216 are read"),
        (
            {"rope_scaling": {"original_max_position_embeddings": 1e30}},
            r"rope_scaling\.\w+ is 1e\+30",
        ),
        ({"num_labels": 100_001}, "num_labels is 100001, but no tensor of the checkpoint is wider than 256"),
        ({"attn_implementation": "someone/kernel"}, r"attn_implementation names compiled code .*'someone/kernel'"),
        ({"text_config": {"experts_implementation": "a/b"}}, r"text_config\.experts_implementation names compiled"),
    ],
)
def test_sizes_that_the_weights_cannot_be_of_are_refused_before_anything_is_built(
    tiny_llama, changes, message, monkeypatch
):
    edit_config(tiny_llama, **changes)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        build(tiny_llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_eps": 1e9, "num_labels": 99_999, "max_position_embeddings": 2**20},
        {"attn_implementation": "sdpa", "vision_config": {"depth": 1000}},
    ],
)
def test_what_is_large_but_may_be_passes(tiny_llama, changes):
    edit_config(tiny_llama, **changes)
    assert build(tiny_llama).config.hidden_size == 64


def test_buffers_larger_than_a_checkpoint_of_this_size_has_are_not_built(tiny_llama, monkeypatch):
    monkeypatch.setattr("qinit.source.skeleton.FEW_BUFFER_BYTES", -Checkpoint.open(tiny_llama).weight_bytes + 16)
    with pytest.raises(CheckpointError, match=r"describes buffers of more than 0\.0 GB \('inv_freq' and others\)"):
        build(tiny_llama)


class TestLoader:
    @pytest.mark.parametrize(
        ("architectures", "name"),
        [
            (["GPT2Model"], "GPT2Model"),
            (["NotAClass", "OPTForCausalLM"], "OPTForCausalLM"),
            (["LlamaConfig"], "AutoModelForCausalLM"),  # it is there, but no model
            ([], "AutoModelForCausalLM"),
            (None, "AutoModelForCausalLM"),
        ],
    )
    def test_it_is_the_first_architecture_that_there_is(self, architectures, name):
        assert loader({"architectures": architectures}).__name__ == name

    def test_code_counts_only_where_it_is_trusted(self):
        config = {
            "architectures": ["OwnForCausalLM"],
            "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.Base", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        }
        assert loader(config).__name__ == "AutoModelForCausalLM"
        assert loader({**config, "architectures": ["Base"]}, trust_remote_code=True).__name__ == "AutoModel"
        assert loader(config, trust_remote_code=True).__name__ == "AutoModelForCausalLM"
        assert loader({**config, "auto_map": {"AutoNothing": "own.X"}}, True).__name__ == "AutoModelForCausalLM"


def test_only_a_refusal_to_run_code_is_taken_for_one(tmp_path):
    file = tmp_path / "config.json"
    refused = own_code(file, ValueError("set the option `trust_remote_code=True`"))
    assert str(refused).startswith(f"{file}: needs code that the checkpoint brings")
    assert own_code(file, ValueError("no such model")) is None
