"""The adapter: scale, ranks, tensors, and the base that it names."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qinit.files.manifest import MANIFEST_NAME
from qinit.verification.factors import point_to
from qinit.verification.findings import Finding
from qinit.verification.verify import verify
from tests.helpers import edit_json, edit_tensors
from tests.qinit.verification.runs import problems, vouched

CONFIG, WEIGHTS = "eqft_init/adapter_config.json", "eqft_init/adapter_model.safetensors"
A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


def key(**values):
    return lambda config: config.update(values)


CONFIGS = {
    "alpha": ("dense", key(lora_alpha=4), "lora_alpha: expected 10, found 4"),
    "rank": ("gptq", key(r=8), "r: expected 4, found 8"),
    "rslora": ("dense", key(use_rslora=False), "use_rslora: expected True, found False"),
    "ranks of layers": ("mixed", key(rank_pattern={}), "rank_pattern: expected {'model.layers.0.self_attn"),
    "alphas of layers": ("mixed", key(alpha_pattern={}), "alpha_pattern: expected {'model.layers.0.self_attn"),
    "modules": ("gptq", key(target_modules=["up_proj"]), "target_modules: expected ['down_proj', 'gate_proj'"),
    "dropout": ("gptq", key(lora_dropout=0.1), "lora_dropout: expected 0.0, found 0.1"),
    "a key of another method": ("gptq", key(use_dora=True), "use_dora: expected False, found True"),
    "orientation": ("kept", key(fan_in_fan_out=False), "fan_in_fan_out: expected True, found False"),
}
TENSORS = {
    "gone": ("gptq", lambda tensors: tensors.pop(A), f"tensor '{A}' is missing"),
    "too many": (
        *("gptq", lambda tensors: tensors.update(x=torch.zeros(1))),
        "tensor 'x' belongs to no layer of the report",
    ),
    "another rank": (
        *("gptq", lambda tensors: tensors.update({A: torch.zeros(5, 64)})),
        f"tensor '{A}': expected float32 [4, 64], found float32 [5, 64]",
    ),
    "another type": (
        *("gptq", lambda tensors: tensors.update({A: tensors[A].half()})),
        f"tensor '{A}': expected float32 [4, 64], found float16 [4, 64]",
    ),
}


HEAD = "base_model.model.score.weight"
TENSORS |= {
    "a head that is gone": ("head", lambda tensors: tensors.pop(HEAD), f"tensor '{HEAD}' is missing"),
    "another head": (
        *("head", lambda tensors: tensors.update({HEAD: tensors[HEAD] + 1})),
        f"tensor '{HEAD}' is not what the base has",
    ),
}


@pytest.mark.parametrize(("kind", "change", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_of_another_adapter_is_named(kind, change, expected, copy_of):
    _, run = copy_of(kind)
    edit_json(run / CONFIG, change)
    (found,) = vouched(run)
    assert found.startswith(f"{CONFIG}: {expected}")


@pytest.mark.parametrize(("kind", "change", "expected"), TENSORS.values(), ids=TENSORS)
def test_tensors_of_another_adapter_are_named(kind, change, expected, copy_of):
    _, run = copy_of(kind)
    edit_tensors(run / WEIGHTS, change)
    assert vouched(run) == [f"{WEIGHTS}: {expected}"]


def test_the_order_of_the_target_modules_says_nothing(copy_of):
    _, run = copy_of("gptq")
    edit_json(run / CONFIG, lambda config: config["target_modules"].reverse())
    assert vouched(run) == []


def moved(run):
    return [each for each in verify(run) if isinstance(each, Finding) and each.moved]


def test_a_run_that_was_moved_is_sound_and_said_to_be_moved(copy_of, tmp_path):
    _, run = copy_of("gptq")
    (copy,) = moved(run)  # the original is still where it was
    assert not copy.grave
    assert "this is a copy" in copy.what
    point_to(run)
    assert moved(run) == []
    place = run.rename(tmp_path / "elsewhere")
    (found,) = moved(place)
    assert not found.grave
    assert (found.expected, found.found) == (str(place), str(run))
    point_to(place)
    assert moved(place) == problems(place) == []  # the sums know of it
    assert json.loads((place / CONFIG).read_text())["base_model_name_or_path"] == str(place)
    assert MANIFEST_NAME in {path.name for path in place.iterdir()}


def test_an_adapter_that_names_another_model_is_a_problem(copy_of, tmp_path):
    source, run = copy_of("gptq")
    other = shutil.copytree(source, tmp_path / "other")
    edit_json(run / CONFIG, key(base_model_name_or_path=str(other)))
    (found,) = vouched(run)
    assert found.startswith(f"{CONFIG}: base_model_name_or_path, which is another model: expected {run}, found {other}")
    edit_json(run / CONFIG, lambda config: config.pop("base_model_name_or_path"))
    (found,) = vouched(run)
    assert found == f"{CONFIG}: base_model_name_or_path: expected {run}, found nothing"


def test_a_base_on_the_hub_is_noted_but_not_looked_up(copy_of):
    _, run = copy_of("gptq")
    edit_json(run / CONFIG, key(base_model_name_or_path="owner/name"))
    assert vouched(run) == []
    notes = [str(each) for each in verify(run) if isinstance(each, Finding)]
    assert notes == [f"{CONFIG}: the base is 'owner/name' on the Hub, which was not looked at"]
