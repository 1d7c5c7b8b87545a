"""Values: finite, in the format's form, and with the source the errors that the report has."""

from __future__ import annotations

import pytest

from tests.helpers import edit_json, edit_tensors
from tests.models import make_checkpoint
from tests.qinit.verification.runs import KINDS, vouched

BASE, FACTORS = "model.safetensors", "eqft_init/adapter_model.safetensors"
UP = "model.layers.0.mlp.up_proj"
B = f"base_model.model.{UP}.lora_B.weight"


def spoil(name, value, place=0):
    return lambda tensors: tensors[name].view(-1).__setitem__(place, value)


def flip(name, bit):
    return lambda tensors: tensors[name].view(-1)[0].bitwise_xor_(1 << bit)


ALONE = {
    "NaN in a scale": (BASE, spoil(f"{UP}.scales", float("nan")), "holds 1 NaN or Inf among 256 values"),
    "Inf in a norm": (BASE, spoil("model.norm.weight", float("inf")), "holds 1 NaN or Inf among 64 values"),
    "NaN in a factor": (FACTORS, spoil(B, float("nan")), "holds 1 NaN or Inf among 512 values"),
    "a group index": (BASE, spoil(f"{UP}.g_idx", 9, 40), "'model.layers.0.mlp.up_proj.g_idx': expected 1 at input 40"),
    "a negative scale": (BASE, spoil(f"{UP}.scales", -0.5), "expected scales above 0, found 1 that are not"),
}
AGAINST = {
    "a code": (BASE, flip(f"{UP}.qweight", 2), f"{UP}: error_start against the source: expected 0."),
    "a zero point": (BASE, flip(f"{UP}.qzeros", 0), f"{UP}: error_start against the source: expected 0."),
    "a scale": (BASE, spoil(f"{UP}.scales", 0.5), f"{UP}: error_start against the source: expected 0."),
    "a factor": (FACTORS, lambda tensors: tensors[B].mul_(1.1), f"{UP}: error against the source: expected 0."),
    "a norm": (BASE, spoil("model.norm.weight", 2), "tensor 'model.norm.weight' is not the source's"),
}


@pytest.mark.parametrize(("file", "change", "expected"), ALONE.values(), ids=ALONE)
def test_values_that_no_run_writes_are_named_without_the_source(file, change, expected, copy_of):
    _, run = copy_of("gptq")
    edit_tensors(run / file, change)
    (found,) = vouched(run)
    assert found.startswith(f"{file}: tensor '")
    assert expected in found


@pytest.mark.parametrize(("file", "change", "expected"), AGAINST.values(), ids=AGAINST)
def test_what_only_the_source_can_tell_is_named(file, change, expected, copy_of):
    source, run = copy_of("gptq")
    edit_tensors(run / file, change)
    assert vouched(run) == []
    found = vouched(run, source)
    assert any(line.startswith(f"{file}: {expected}") for line in found), found
    assert not any(f"{each}: error" in line for line in found for each in ("q_proj", "layers.1.mlp.up_proj"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_report_that_was_not_measured_is_found(kind, copy_of):
    source, run = copy_of(kind)

    def change(report):
        row = next(row for row in report["layers"] if row["bits"])
        row["error"] *= 1.001  # the totals will contradict it too

    edit_json(run / "qinit.json", change)
    found = vouched(run, source)
    assert sum("totals: error, made anew" in line for line in found) == 1
    assert sum(": error against the source: expected " in line for line in found) == 1


def test_a_layer_that_was_kept_has_the_sources_weight_and_a_plain_start(copy_of):
    source, run = copy_of("kept")
    edit_tensors(run / BASE, lambda tensors: tensors["h.0.attn.c_proj.weight"].mul_(2))
    edit_tensors(run / FACTORS, spoil("base_model.model.h.0.attn.c_proj.lora_B.weight", 1.0))
    assert vouched(run, source) == [
        f"{BASE}: tensor 'h.0.attn.c_proj.weight' is not the source's",
        f"{FACTORS}: tensor 'base_model.model.h.0.attn.c_proj.lora_B.weight', of a layer that was kept: "
        "expected zeros, found other values",
    ]


def test_the_same_architecture_with_other_weights_differs_in_every_layer(copy_of, tmp_path):
    _, run = copy_of("gptq")
    other = make_checkpoint(tmp_path / "other", "llama", seed=1)
    found = vouched(run, other)
    assert sum("error_start against the source" in line for line in found) == 14
    assert any("tensor 'lm_head.weight' is not the source's" in line for line in found)
