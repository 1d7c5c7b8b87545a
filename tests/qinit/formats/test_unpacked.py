"""Starts on bases that others have quantized, without the model that those were made from."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from qinit.errors import CheckpointError, RecipeError
from qinit.formats import format_of
from qinit.formats.unpacked import unpacked
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import read_architecture
from qinit.trial.names import lost_names
from tests.helpers import edit_config, edit_tensors, plan_of, repair, weights_of
from tests.others import packed_base

TEXT = {"calibration": "random", "calibration_samples": 6, "calibration_length": 24}


def view(base):
    checkpoint = Checkpoint.open(base, quantized=True)
    return unpacked(checkpoint, read_architecture(checkpoint), format_of(checkpoint.config))


def plain(base, to):
    """Write a base as its loader unpacks it, in float32."""
    shutil.copytree(base, to, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.read() for name, tensor in view(base).tensors.items()}, to / "model.safetensors")
    edit_config(to, quantization_config=None)
    return to


@pytest.mark.parametrize(
    ("form", "method"),
    [("gptq", "lora"), ("gptq_v2", "eva"), ("awq", "eva"), ("bitsandbytes", "dora"), ("compressed-tensors", "dora")],
)
def test_a_start_is_that_of_the_unpacked_base(form, method, llama, tmp_path):
    kinds = ("_proj.weight", "lm_head.weight") if form == "compressed-tensors" else ("_proj.weight",)
    base = packed_base(llama, tmp_path / "base", form, lambda name: "layers.0.mlp.up_proj" in name, kinds)
    same = plain(base, tmp_path / "same")
    options = {"method": method, **(TEXT if method == "eva" else {})}
    report = repair(base, base, tmp_path / "out", **options)
    repair(same, same, tmp_path / "plain", **options)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    assert {row.bits for row in report.layers} == {4, 16}
    assert {(row.error_start, row.error) for row in report.layers} == {(0.0, 0.0)}
    assert report.totals["base"]["form"] == form.removesuffix("_v2")
    assert lost_names(base, tmp_path / "out", base, "LlamaForCausalLM") == []


def test_what_is_unpacked_is_read_in_every_way_alike(llama, tmp_path):
    found = view(packed_base(llama, tmp_path / "base", "gptq"))
    assert "quantization_config" not in found.config
    tensor = found.tensors["model.layers.0.mlp.up_proj.weight"]
    value = tensor.read()
    assert (value.dtype, tensor.nbytes) == (tensor.dtype, value.nbytes)
    assert torch.equal(torch.cat(list(tensor.chunks(1 << 10))).view(torch.float32).reshape(value.shape), value)
    assert tensor.first_bytes(64) == value.flatten()[:16].numpy().tobytes()
    tensor.announce()


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_dora_is_refused_where_peft_has_none(form, llama, tmp_path):
    base = packed_base(llama, tmp_path / "base", form)
    with pytest.raises(RecipeError, match="PEFT puts no dora on layers packed as"):
        plan_of(base, base=str(base), method="dora")


def test_methods_that_change_the_weights_and_a_part_of_a_layer_are_refused(llama, tmp_path):
    base = packed_base(llama, tmp_path / "base", "gptq")
    with pytest.raises(CheckpointError, match=r"already quantized .*; give the full-precision model"):
        plan_of(base, method="pissa")
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({"lm_head.qweight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"'lm_head.qweight' for what is no linear layer"):
        plan_of(base, base=str(base), method="lora")
