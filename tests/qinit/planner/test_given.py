import pytest
import torch

from qinit.errors import CheckpointError, TargetError
from tests.helpers import edit_config, edit_tensors, plan_of
from tests.models import make_checkpoint
from tests.others import CONFIGS, packed_base

WIDTHS = {"gptq": (4, 32), "gptq_v2": (4, 32), "awq": (4, 32), "bitsandbytes": (4, 64), "compressed-tensors": (4, 32)}


@pytest.fixture
def base(llama, tmp_path):
    return packed_base(llama, tmp_path / "base", "gptq")


@pytest.mark.parametrize("form", CONFIGS)
def test_the_layers_are_those_of_the_base_and_nothing_of_it_is_written(form, llama, tmp_path):
    base = packed_base(llama, tmp_path / "base", form)
    plan = plan_of(llama, base=str(base))
    assert {(layer.bits, layer.group_size) for layer in plan.quantized} == {WIDTHS[form]}
    assert len(plan.quantized) == len(plan.layers) == 14
    assert plan.given.form == form.removesuffix("_v2")
    assert (plan.base_specs, plan.copied, plan.written_bytes) == ([], (), plan.adapter_bytes)
    packed = sum(tensor.nbytes for name, tensor in plan.given.checkpoint.tensors.items() if "_proj." in name)
    unread = 64 * 14 if form == "bitsandbytes" else 0  # its quant_map, which the loader passes over
    assert sum(layer.bytes_after for layer in plan.layers) == packed - unread


def test_what_the_base_has_not_quantized_is_kept(llama, tmp_path):
    base = packed_base(llama, tmp_path / "base", "bitsandbytes", keep=lambda name: "down_proj" in name)
    plan = plan_of(llama, base=str(base))
    assert {layer.target.name.rpartition(".")[2] for layer in plan.layers if layer.kept} == {"down_proj"}
    assert any("the base has not quantized it" in note for note in plan.notes)
    with pytest.raises(TargetError, match="none of the 2 chosen layers is quantized in the base"):
        plan_of(llama, base=str(base), target_modules="down_proj")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"quant_method": "hqq"}, "quantized as hqq; read are GPTQ, ordinary weights, AWQ"),
        ({**CONFIGS["gptq"], "checkpoint_format": "marlin"}, "gptq as marlin"),
    ],
)
def test_a_form_that_is_not_read_is_named(config, what, llama, base):
    edit_config(base, quantization_config=config)
    with pytest.raises(CheckpointError, match=what):
        plan_of(llama, base=str(base))


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("llama", {"intermediate_size": 96}, r"mlp.down_proj is \(64, 96\), and in the source \(64, 128\)"),
        ("llama", {"num_hidden_layers": 3}, "layers.2.mlp.down_proj is .*, and in the source not there"),
        ("mistral", {}, "it is a MistralForCausalLM, and the source a LlamaForCausalLM"),
    ],
)
def test_a_base_of_another_model_is_refused(family, changes, what, llama, tmp_path):
    base = packed_base(make_checkpoint(tmp_path / "other", family, **changes), tmp_path / "base", "dense")
    with pytest.raises(CheckpointError, match=what):
        plan_of(llama, base=str(base))


def test_a_model_that_is_not_quantized_is_no_base_but_of_a_plain_start(llama, tmp_path):
    copy = tmp_path / "copy"  # in another type, so that no byte of the weights is the same
    make_checkpoint(copy, dtype="float16")
    with pytest.raises(CheckpointError, match="is not quantized: it has the source's own weights"):
        plan_of(llama, base=str(copy))
    assert len(plan_of(llama, base=str(copy), method="qlora").quantized) == 14


def test_a_rank_beyond_a_layer_is_refused(llama, base):
    with pytest.raises(TargetError, match=r"rank: 33 is beyond model.layers.0.self_attn.k_proj, .* 32 at most"):
        plan_of(llama, base=str(base), rank=33)


def test_tensors_that_do_not_fit_are_refused(llama, base):
    name = "model.layers.0.self_attn.q_proj.scales"
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(1, 64).half()}))
    with pytest.raises(CheckpointError, match=r"q_proj.scales' has shape \[1, 64\], expected \[2, 64\]"):
        plan_of(llama, base=str(base))
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"has nothing for model.layers.0.self_attn.q_proj.weight"):
        plan_of(llama, base=str(base))


def test_experts_stay_as_the_base_has_them(tmp_path):
    source = make_checkpoint(tmp_path / "source", "mixtral")
    base = packed_base(source, tmp_path / "base", "bitsandbytes")
    plan = plan_of(source, base=str(base))
    assert {layer.target.name.rpartition(".")[2] for layer in plan.layers} == {f"{name}_proj" for name in "qkvo"}
