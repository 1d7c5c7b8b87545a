"""Configuration, index and headers against the report, with sums that vouch for what was changed."""

from __future__ import annotations

import json

import pytest
import torch

from qinit.files.tensors import write_header_only
from tests.helpers import edit_json, edit_tensors
from tests.qinit.verification.runs import vouched

UP = "model.layers.0.mlp.up_proj"
INDEX = "model.safetensors.index.json"


def quantization(**values):
    return lambda config: config["quantization_config"].update(values)


def head(**values):
    return lambda config: config.update(values)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


BASE = "model.safetensors"
CASES = {
    "bits": ("gptq", "config.json", quantization(bits=4), "quantization_config.bits: expected 3, found 4"),
    "group size": ("gptq", "config.json", quantization(group_size=64), "group_size: expected 32, found 64"),
    "zeros of version 1": (
        *("gptq", "config.json", quantization(checkpoint_format="gptq")),
        "checkpoint_format: expected gptq_v2, found gptq",
    ),
    "an unknown key": (
        "gptq",
        "config.json",
        quantization(act=1),
        "config.act: expected nothing, found 1",
    ),
    "not quantized": (
        *("gptq", "config.json", lambda config: config.pop("quantization_config")),
        "quantization_config: expected {'quant_method': 'gptq'",
    ),
    "quantized though dense": (
        *("dense", "config.json", head(quantization_config={"bits": 2})),
        "quantization_config: expected nothing, found {'bits': 2}",
    ),
    "widths of layers": ("mixed", "config.json", quantization(dynamic={}), "quantization_config.dynamic: expected {"),
    "another shape": (
        "gptq",
        "config.json",
        head(intermediate_size=160),
        f"{UP}: shape: expected [128, 64]",
    ),
    "fewer layers": (
        "gptq",
        "config.json",
        head(num_hidden_layers=1),
        "layers.1.mlp.up_proj: shape: expected",
    ),
    "another class": (
        *("dense", "config.json", head(architectures=["LlamaModel"])),
        "the model's class: expected LlamaForCausalLM, found LlamaModel",
    ),
    "no class": ("dense", "config.json", head(model_type="gone"), "does not know this model (model_type 'gone')"),
    "a tensor that is gone": ("gptq", BASE, drop(f"{UP}.qzeros"), f"tensor '{UP}.qzeros' is missing"),
    "a norm that is gone": ("gptq", BASE, drop("model.norm.weight"), "bytes of all tensors: expected"),
    "a tensor too many": (
        *("gptq", BASE, put(f"{UP}.weight", torch.zeros(128, 64))),
        f"tensor '{UP}.weight' is none of {UP}'s",
    ),
    "another type": (
        *("gptq", BASE, lambda tensors: tensors.update({f"{UP}.scales": tensors[f"{UP}.scales"].float()})),
        f"tensor '{UP}.scales': expected float16 [2, 128], found float32 [2, 128]",
    ),
    "another form": (
        *("gptq", BASE, put(f"{UP}.qweight", torch.zeros(4, 128, dtype=torch.int32))),
        f"tensor '{UP}.qweight': expected int32 [6, 128], found int32 [4, 128]",
    ),
    "a kept weight that is gone": ("kept", BASE, drop("h.0.attn.c_proj.weight"), "'h.0.attn.c_proj.weight' is missing"),
    "a kept weight of another form": (
        *("kept", BASE, put("h.0.attn.c_proj.weight", torch.zeros(32, 64, dtype=torch.bfloat16))),
        "tensor 'h.0.attn.c_proj.weight': expected bfloat16 [64, 64], found bfloat16 [32, 64]",
    ),
    "not indexed": (
        *("dense", INDEX, lambda index: index["weight_map"].pop(f"{UP}.weight")),
        f"tensor '{UP}.weight' is not in the index",
    ),
    "indexed elsewhere": (
        *("dense", INDEX, lambda index: index["weight_map"].update({"x": index["weight_map"][f"{UP}.weight"]})),
        "tensor 'x' is not there, but the index places it here",
    ),
    "another sum": ("dense", INDEX, lambda index: index["metadata"].update(total_size=7), "total_size: expected"),
    "a shard that leaves": (
        *("dense", INDEX, lambda index: index["weight_map"].update({"x": "../y"})),
        "'x' is placed in '../y', which is no plain file name",
    ),
}


@pytest.mark.parametrize(("kind", "file", "change", "expected"), CASES.values(), ids=CASES)
def test_what_does_not_agree_is_named_with_its_file(kind, file, change, expected, copy_of):
    _, run = copy_of(kind)
    (edit_json if file.endswith(".json") else edit_tensors)(run / file, change)
    found = vouched(run)
    assert any(expected in line for line in found), found
    if file != INDEX:  # whose tensors are in the shards
        assert all(line.startswith(f"{file}: ") for line in found), found


def test_a_shard_that_is_gone_and_one_that_is_damaged_are_both_named(copy_of):
    _, run = copy_of("dense")
    first, second, *_ = sorted(run.glob("model-*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    found = vouched(run)
    assert found[0] == f"{first.name}: cannot be read (No such file or directory)"
    assert found[1].startswith(f"{second.name}: the header describes ")
    assert len(found) == 2


def test_a_file_beside_the_index_that_a_loader_would_take_is_named(copy_of):
    _, run = copy_of("dense")
    (run / BASE).write_bytes(next(run.glob("model-*.safetensors")).read_bytes())
    assert f"{INDEX}: stands beside {BASE}, which loaders take instead" in vouched(run)


def test_a_header_without_its_data_is_found_when_the_values_are_read(copy_of):
    _, run = copy_of("gptq")
    raw = (run / BASE).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    write_header_only(run / BASE, header)
    found = vouched(run)
    assert found
    assert all(line.startswith(f"{BASE}: ends inside tensor '") for line in found)
