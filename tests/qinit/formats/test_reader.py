"""Every form that qinit reads, packed by hand in tests/others.py and held against the package that loads it."""

import json

import pytest
import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import read_header
from qinit.formats import format_of
from qinit.source.targets import LinearModule
from tests import others
from tests.helpers import gauss

CPU = torch.device("cpu")
MODULE = LinearModule("a.b", 64, 96, transposed=False)
WEIGHT = gauss(64, 96, scale=0.02)


def stored(parts, tmp_path):
    """Save a layer's parts, and return their places."""
    from safetensors.torch import save_file

    save_file({part: tensor.contiguous() for part, tensor in parts.items()}, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors")


def read(form, parts, tmp_path, module=MODULE, **config):
    config = {"quantization_config": {**others.CONFIGS[form], **config}}
    reader = format_of(config)
    assert reader.cannot_read(config) is None
    return reader.read(module, stored(parts, tmp_path), config, CPU)


@pytest.mark.parametrize("form", others.PACKERS)
def test_a_layer_is_read_as_it_was_packed(form, tmp_path):
    parts, values = others.PACKERS[form](WEIGHT)
    assert torch.equal(read(form, parts, tmp_path), values)
    assert 0.01 < float((values - WEIGHT).norm() / WEIGHT.norm()) < 0.2


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_first_version_of_gptq_has_one_more_in_each_zero_point(bits, tmp_path):
    parts, values = others.gptq(WEIGHT, bits)
    assert torch.equal(read("gptq", parts, tmp_path, bits=bits), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_auto_round_is_a_first_version_of_gptq_without_an_order_of_the_inputs(bits, tmp_path):
    parts, values = others.gptq(WEIGHT, bits)
    parts.pop("g_idx")
    own = {"extra_config": {MODULE.name: {"bits": bits}}, "bits": 5, "group_size": 32}
    config = {"quantization_config": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", **own}}
    reader = format_of(config)
    assert reader.cannot_read(config) is None
    assert torch.equal(reader.read(MODULE, stored(parts, tmp_path), config, CPU), values)
    config["quantization_config"]["packing_format"] = "auto_round:auto_awq"
    assert "auto-round as auto_round:auto_awq" in reader.cannot_read(config)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (8, True), (4, False), (3, False)])
def test_compressed_tensors_have_any_width_and_zero_points(bits, symmetric, tmp_path):
    parts, values = others.compressed(WEIGHT, bits, symmetric=symmetric)
    assert torch.equal(read("compressed-tensors", parts, tmp_path), values)


def test_compressed_groups_may_follow_the_activations(tmp_path):
    parts, values = others.compressed(WEIGHT)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    codes = others.rounded(WEIGHT, 4, 32, symmetric=True)[0][:, order]
    parts |= {"weight_packed": others.pack_rows(codes, 4), "weight_g_idx": (order // 32).int()}
    assert torch.equal(read("compressed-tensors", parts, tmp_path), values[:, order])


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_is_what_bitsandbytes_dequantizes(nested, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(WEIGHT.bfloat16(), quant_type="nf4", compress_statistics=nested)
    parts = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    parts = {name.replace("weight.weight.", "weight."): value for name, value in parts.items()}
    # As one row: with AVX-512, 0.50.2 takes a wrong scale where a block of 64 goes on in the next row.
    state.shape = torch.Size((1, WEIGHT.numel()))
    expected = functional.dequantize_4bit(packed, state).float().view_as(WEIGHT)
    assert torch.equal(read("bitsandbytes", parts, tmp_path), expected)


def test_awq_is_what_gptqmodel_dequantizes():
    packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    parts, values = others.awq(WEIGHT)
    found = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, 32)
    assert torch.equal(found.T.float(), values)


@pytest.mark.parametrize(
    ("form", "config", "what"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "gptq as marlin"),
        ("awq", {"version": "gemv"}, "awq as gemv"),
        ("bitsandbytes", {"bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ("bitsandbytes", {"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes 8 bits"),
        ("compressed-tensors", {"format": "float-quantized"}, "compressed-tensors as float-quantized"),
        ("compressed-tensors", {"config_groups": {}}, "compressed-tensors as nothing"),
    ],
)
def test_what_is_not_read_is_named(form, config, what):
    config = {"quantization_config": {**others.CONFIGS[form], **config}}
    assert what in format_of(config).cannot_read(config)


@pytest.mark.parametrize("form", others.PACKERS)
def test_tensors_of_another_module_are_refused(form, tmp_path):
    parts, _ = others.PACKERS[form](WEIGHT)
    with pytest.raises(CheckpointError, match=r"expected|has shape|words|groups"):
        read(form, parts, tmp_path, LinearModule("a.b", 64, 128, transposed=False))


def test_a_damaged_state_of_nf4_is_refused(tmp_path):
    parts, _ = others.nf4(WEIGHT)
    parts[others.STATE] = torch.tensor(list(json.dumps({"blocksize": 0}).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"is no quant_state of nf4"):
        read("bitsandbytes", parts, tmp_path)
