"""Nothing of it is found in what was just trained: tests/cli/test_snndlft.py."""

import json
import shutil

import pytest
import torch

from qinit.snndlft.training import Asked, run
from qinit.snndlft.verification import verify_training
from qinit.verification.findings import Finding
from tests.helpers import edit_json, edit_tensors
from tests.qinit.snndlft import tiny
from tests.qinit.snndlft.test_tasks import data, text


@pytest.fixture(scope="module")
def trained(reader, tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    asked = Asked("reader", reader, data(text(place, 400)), tiny.config(**tiny.PLAIN), 3, 4, 1e-2, device="cpu")
    run(asked, place / "out")
    return place / "out"


def without_sums(directory):
    (directory / "SHA256SUMS").unlink()


def no_number(directory):
    without_sums(directory)
    edit_tensors(directory / "adapter_model.safetensors", lambda found: [t.fill_(torch.nan) for t in found.values()])


def fewer_triplets(directory):
    without_sums(directory)
    edit_tensors(
        directory / "adapter_model.safetensors",
        lambda found: found.update({name: t[:0] for name, t in found.items() if name.endswith("lora_E")}),
    )


def another_type(directory):
    without_sums(directory)
    edit_json(directory / "adapter_config.json", lambda raw: raw.update(peft_type="LORA"))


def base_gone(directory):
    without_sums(directory)
    edit_json(directory / "adapter_config.json", lambda raw: raw.update(base_model_name_or_path="/nowhere/base"))


def half_a_file(directory):
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def damaged_report(directory):
    without_sums(directory)
    (directory / "qinit.json").write_text(json.dumps({"kind": "snndlft"}))


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (no_number, "adapter_model.safetensors", "holds"),
        (fewer_triplets, "adapter_model.safetensors", ": triplets"),
        (another_type, "adapter_config.json", "peft_type"),
        (base_gone, "adapter_config.json", "names the base '/nowhere/base', which is not there"),
        (half_a_file, "adapter_model.safetensors", "has changed since it was written"),
        (damaged_report, "qinit.json", "not the report of a training"),
    ],
)
def test_what_is_wrong_is_named(trained, tmp_path, damage, file, words):
    directory = shutil.copytree(trained, tmp_path / "out")
    damage(directory)
    found = [event for event in verify_training(directory) if isinstance(event, Finding) and event.grave]
    assert found
    assert (found[0].file, words in found[0].what) == (file, True), found
