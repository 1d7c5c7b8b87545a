import pytest
import safetensors.torch
import torch

from qinit.solver.methods import METHODS
from tests.helpers import plan_of, quantize


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


def test_a_layer_is_solved_as_its_format_stores_it(tiny_llama):
    for format, storage in (("gptq", None), ("dense", torch.bfloat16)):
        plan = plan_of(tiny_llama, format=format, bits=3, iter=7)
        spec = plan.layer_spec(plan.layers[0])
        assert (spec.bits, spec.group_size, spec.rank, spec.iterations, spec.storage) == (3, 64, 4, 7, storage)


def test_a_layer_without_data_is_solved_by_the_row_without_calibration(tiny_llama):
    plan = plan_of(tiny_llama, calibration="random", iter=9)
    spec = plan.data_free_spec(plan.layers[0])
    assert (spec.method, spec.iterations) == (METHODS["eqft"], METHODS["eqft"].iterations)
    assert (spec.bits, spec.group_size, spec.rank, spec.storage) == (2, 64, 4, None)
    assert plan.layer_spec(plan.layers[0]).iterations == 9


def test_sizes_do_not_depend_on_it(tiny_llama):
    plain, calibrated = plan_of(tiny_llama), plan_of(tiny_llama, calibration="random")
    assert (plain.base_bytes, plain.adapter_bytes) == (calibrated.base_bytes, calibrated.adapter_bytes)


class TestFewTokens:
    def test_the_plan_says_it_with_the_option_to_give(self, tiny_llama):
        options = {"calibration": "random", "calibration_samples": 6, "calibration_length": 16}
        assert plan_of(tiny_llama, **options).notes == (
            "calibration: 96 tokens are fewer than the 128 inputs of the widest layer, so H is singular and damped "
            "more; 1024 or more are better: give --calibration-samples 64",
        )
        assert plan_of(tiny_llama, **{**options, "calibration_samples": 8}).notes == ()

    def test_samples_longer_than_the_model_takes_count_as_they_will_be(self, tiny_llama):
        options = {"calibration": "random", "calibration_samples": 1, "calibration_length": 4096}
        assert plan_of(tiny_llama, **options).notes == ()  # 128 tokens
        assert plan_of(tiny_llama, **{**options, "calibration": "none"}).notes == ()
