import pytest
import safetensors.torch
import torch

from qinit.errors import TargetError
from qinit.plan import make_plan
from qinit.recipe import make_recipe
from qinit.safetensors_io import StoredTensor
from tests.conftest import make_checkpoint, quantize


def plan_of(directory, **options):
    return make_plan(make_recipe(**{"rank": 4, "calibration": "none", **options}), directory, "name")


@pytest.mark.parametrize("format", ["gptq", "dense"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_plans_sizes_are_the_sizes_of_what_a_run_writes(tmp_path, tiny_llama, format, bits):
    plan = plan_of(tiny_llama, format=format, bits=bits)
    quantize(tiny_llama, tmp_path / "out", format=format, bits=bits)
    base = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    factors = safetensors.torch.load_file(tmp_path / "out/eqft_init/adapter_model.safetensors")
    assert plan.base_bytes == sum(tensor.nbytes for tensor in base.values())
    assert plan.adapter_bytes == sum(tensor.nbytes for tensor in factors.values())
    replaced = {name for name in base if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))}
    if format == "dense":
        replaced = {layer.target.tensor.name for layer in plan.quantized}
    weights = sum(layer.weights for layer in plan.quantized)
    assert plan.bits_per_weight == pytest.approx(8 * sum(base[name].nbytes for name in replaced) / weights)
    assert plan.grid_bits_per_weight == pytest.approx(bits + (16 + bits) / 64)


def test_planning_reads_no_weights(tiny_llama, monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(StoredTensor, "read", refuse)
    monkeypatch.setattr(StoredTensor, "chunks", refuse)
    assert len(plan_of(tiny_llama).quantized) == 14


def test_shapes_that_gptq_cannot_hold_are_kept_with_the_reason(tmp_path):
    directory = make_checkpoint(tmp_path / "m", intermediate_size=80)  # gate, up: 80 outputs; down: 80 inputs
    plan = plan_of(directory)
    kept = {layer.target.name: layer.kept for layer in plan.layers if layer.kept}
    assert kept["model.layers.0.mlp.up_proj"] == "80 x 64 is not divisible by 32"
    assert len(kept) == 6
    assert len(plan.notes) == 6
    assert {tensor.name for tensor in plan.copied} >= {name + ".weight" for name in kept}
    assert not any(layer.kept for layer in plan_of(directory, format="dense").layers)


def test_inputs_that_the_group_size_does_not_divide_are_kept_for_gptq(tmp_path):
    plan = plan_of(make_checkpoint(tmp_path / "m", intermediate_size=96))
    kept = [layer for layer in plan.layers if layer.kept]
    assert [layer.target.name for layer in kept] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert kept[0].kept == "96 inputs are not divisible by the group size 64"


def test_a_model_that_the_format_cannot_hold_at_all_is_refused_with_the_way_out(tmp_path):
    directory = make_checkpoint(tmp_path / "m", intermediate_size=80)
    with pytest.raises(TargetError, match=r"can hold none of the 6 chosen layers .* use --format dense"):
        plan_of(directory, target_modules="gate_proj,up_proj,down_proj")


def test_a_rank_above_a_matrix_is_lowered_for_that_layer_and_said(tiny_llama):
    plan = plan_of(tiny_llama, rank=48)
    ranks = {layer.target.name.rsplit(".", 1)[-1]: layer.rank for layer in plan.layers}
    assert ranks == {
        **dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 48),
        **dict.fromkeys(("k_proj", "v_proj"), 32),
    }
    assert plan.notes[0] == ("model.layers.0.self_attn.k_proj: rank lowered from 48 to 32, all that its shape allows")


def test_a_group_longer_than_a_row_is_the_row(tiny_llama):
    plan = plan_of(tiny_llama, format="dense", group_size=10**12)  # would be padded to terabytes
    assert {layer.group_size for layer in plan.layers} == {64, 128}


def test_a_layer_is_solved_as_its_format_stores_it(tiny_llama):
    for format, storage in (("gptq", None), ("dense", torch.bfloat16)):
        plan = plan_of(tiny_llama, format=format, bits=3, iter=7)
        spec = plan.layer_spec(plan.layers[0])
        assert (spec.bits, spec.group_size, spec.rank, spec.iterations, spec.storage) == (3, 64, 4, 7, storage)


def test_working_memory_depends_on_the_largest_layer_only(tmp_path):
    two, four = (plan_of(make_checkpoint(tmp_path / str(n), num_hidden_layers=n)) for n in (2, 4))
    assert two.working_bytes == four.working_bytes > 0
    assert two.bytes_before < four.bytes_before
