"""What was trained on a run, published with the run's base."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from qinit.errors import CheckpointError, ReportError
from qinit.files.manifest import MANIFEST_NAME, bytes_sum, read_manifest
from qinit.hub.prepare import prepare
from qinit.hub.push import _staged as staged
from qinit.hub.push import push
from tests.helpers import contents, edit_tensors
from tests.hub_stand_in import WRITER
from tests.stock import load_base, logits
from tests.trained import train

REPO = "me/tiny"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    return train(finished, tmp_path_factory.mktemp("trained") / "out")


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_base_and_trained_adapter_are_pushed_and_nothing_else_of_the_trainer(hub, run, trained, tmp_path):
    before = contents(run), contents(trained)
    push(prepare(run, REPO, trained), token=WRITER)
    assert (contents(run), contents(trained)) == before
    there = hub.files(REPO)
    own = {name for name in before[0] if not name.startswith("eqft_init/")}
    assert there.keys() == {*own, "adapter/adapter_config.json", "adapter/adapter_model.safetensors", ".gitattributes"}
    assert there["adapter/adapter_model.safetensors"] == before[1]["adapter_model.safetensors"]
    assert there["adapter/adapter_model.safetensors"] != before[0]["eqft_init/adapter_model.safetensors"]
    ours, theirs = (json.loads(c) for c in (before[1]["adapter_config.json"], there["adapter/adapter_config.json"]))
    assert theirs == {**ours, "base_model_name_or_path": REPO}
    (tmp_path / MANIFEST_NAME).write_bytes(there[MANIFEST_NAME])
    sums = {name: bytes_sum(data) for name, data in there.items() if name not in (".gitattributes", MANIFEST_NAME)}
    assert read_manifest(tmp_path) == sums


def test_the_card_says_that_it_was_trained_and_its_lines_load_it(run, trained):
    prepared = prepare(run, REPO, trained)
    card = prepared.rewritten["README.md"].decode()
    assert "The adapter in `adapter/` was trained" in card
    assert "eqft_init" not in card
    assert "\n".join(prepared.snippet()) == re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]
    assert prepared.snippet("v2")[-1] == (
        'model = PeftModel.from_pretrained(base, "me/tiny", revision="v2", subfolder="adapter")'
    )
    assert {"optimizer.pt", "training_args.bin"} <= {Path(name).name for name in prepared.left_out}


def test_what_is_pushed_is_loaded_by_the_lines_that_are_said(run, trained):
    from peft import PeftModel

    prepared, names = prepare(run, REPO, trained), {}
    with staged(prepared) as folder:  # a directory in the place of the repository's id
        exec("\n".join(prepared.snippet()).replace(json.dumps(REPO), json.dumps(str(folder))), names)
    assert torch.equal(logits(names["model"]), logits(PeftModel.from_pretrained(load_base(run, dtype="auto"), trained)))


def test_a_card_that_was_written_anew_gets_the_lines_too(run, trained):
    (run / "README.md").write_text("# Mine\n")
    card = prepare(run, REPO, trained).rewritten["README.md"].decode()
    assert card.startswith("# Mine\n## Trained\n")
    assert 'subfolder="adapter")\n```\n' in card


def test_one_takes_the_place_of_the_other(hub, run, trained):
    push(prepare(run, REPO), token=WRITER)
    push(prepare(run, REPO, trained), token=WRITER)
    assert not [name for name in hub.files(REPO) if name.startswith("eqft_init/")]
    push(prepare(run, REPO), token=WRITER)
    assert not [name for name in hub.files(REPO) if name.startswith("adapter/")]


def test_an_adapter_that_was_trained_in_the_run_s_own_place_is_pushed_too(run, trained):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(trained / name, run / "eqft_init" / name)
    with pytest.raises(ReportError, match=f"push it with --adapter {run / 'eqft_init'}"):
        prepare(run, REPO)
    assert "adapter/adapter_model.safetensors" in prepare(run, REPO, run / "eqft_init").files


def test_one_of_another_base_and_a_directory_without_a_run_are_refused(run, trained, tmp_path):
    other = Path(shutil.copytree(trained, tmp_path / "other"))

    def rename(tensors):
        tensors["base_model.model.h.0.lora_A.weight"] = torch.ones(4, 64)

    edit_tensors(other / "adapter_model.safetensors", rename)
    with pytest.raises(
        CheckpointError, match=f"^{other}: does not fit the base of {run}: h.0 is no module of the base"
    ):
        prepare(run, REPO, other)
    with pytest.raises(ReportError, match="give the run that it was trained on, and this directory with --adapter"):
        prepare(trained, REPO)


def test_a_run_without_a_list_pushes_no_state_of_a_trainer(run):
    (run / MANIFEST_NAME).unlink()
    (run / "checkpoint-3").mkdir()
    for name in ("optimizer.pt", "training_args.bin", "checkpoint-3/rng.json"):
        (run / name).write_text("x")
    assert set(prepare(run, REPO).left_out) == {"optimizer.pt", "training_args.bin", "checkpoint-3/rng.json"}
