import json
import shutil
from pathlib import Path

import pytest

from qinit.errors import CheckpointError
from qinit.merge.plan import plan_merge
from qinit.trial.fitting import BASE_KEY
from tests.helpers import edit_json, edit_tensors, quantize
from tests.models import make_checkpoint

WEIGHTS = "adapter_model.safetensors"
UP = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture
def trained(finished, tmp_path):
    """What a trainer has saved elsewhere: a copy of a run's adapter."""
    return Path(shutil.copytree(finished / "eqft_init", tmp_path / "trained"))


def named(adapter, base):
    edit_json(adapter / "adapter_config.json", lambda config: config.update({BASE_KEY: base}))


@pytest.mark.parametrize("base", ["itself", "a copy", "as the run names itself", "the end of its path"])
def test_its_own_base_is_known_wherever_it_lies(finished, trained, tmp_path, base):
    own = json.loads((finished / "eqft_init/adapter_config.json").read_text())[BASE_KEY]
    where = {
        "itself": lambda: str(finished),
        "a copy": lambda: str(shutil.copytree(finished, tmp_path / "copy")),
        "as the run names itself": lambda: own,
        "the end of its path": lambda: "/".join(Path(own).parts[-2:]),
    }
    named(trained, where[base]())
    assert plan_merge(finished, trained).notes == ()


def test_a_run_that_was_moved_or_pushed_is_known_by_the_name_that_its_own_adapter_has(finished, trained, tmp_path):
    run = shutil.copytree(finished, tmp_path / "moved")
    for adapter in (trained, run / "eqft_init"):
        named(adapter, "me/llama-2bit")
    assert plan_merge(run, trained).notes == ()
    named(trained, "/gone/elsewhere")
    (note,) = plan_merge(run, trained).notes
    assert "names the base '/gone/elsewhere', which is not here" in note
    named(trained, None)
    assert "names no base" in plan_merge(run, trained).notes[0]


def test_one_that_was_pushed_with_its_base_belongs_to_it(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "eqft_init").rename(run / "adapter")
    named(run / "adapter", "me/trained")
    plan = plan_merge(run)
    assert (plan.adapter, plan.notes, plan.own) == (run / "adapter", (), False)
    assert plan_merge(run, run / "adapter").layout.steps


def test_another_base_is_refused(finished, trained, tmp_path):
    quantize(make_checkpoint(tmp_path / "source"), tmp_path / "other", format="dense", bits=3)
    source = json.loads((finished / "qinit.json").read_text())["source"]["model"]
    for base in (str(tmp_path / "other"), source):
        named(trained, base)
        words = r"which is another model \(its weights have the sum \w+\.\.\., not \w+\.\.\.\); give the run"
        with pytest.raises(CheckpointError, match=rf"{BASE_KEY} is '{base}', {words}"):
            plan_merge(finished, trained)
    moved = shutil.copytree(finished, tmp_path / "moved")
    edit_json(moved / "qinit.json", lambda report: report["source"].update(model="meta-llama/Llama-3.2-1B"))
    named(trained, "meta-llama/Llama-3.2-1B")
    with pytest.raises(CheckpointError, match="the 16-bit model that the run was made from"):
        plan_merge(moved, trained)


def test_names_and_shapes_that_peft_does_not_find_on_the_base_are_refused(finished, trained):
    before = (trained / WEIGHTS).read_bytes()
    for change, words in (
        (
            lambda t: t.update({UP: t[UP][:, :32].clone()}),
            r"'.*up_proj.lora_A.weight' is \[4, 32\], .* wants \[4, 64\]",
        ),
        (lambda t: t.update({UP.replace("layers.1", "layers.7"): t[UP].clone()}), r"layers\.7\.mlp\.up_proj"),
        (lambda t: t.pop(UP), "holds nothing for .*up_proj.lora_A.weight|up_proj has one of its two factors"),
    ):
        (trained / WEIGHTS).write_bytes(before)
        edit_tensors(trained / WEIGHTS, change)
        with pytest.raises(CheckpointError, match=words):
            plan_merge(finished, trained)


def test_a_rank_that_its_configuration_does_not_have_is_refused(finished, trained):
    edit_json(trained / "adapter_config.json", lambda config: config.update(rank_pattern={"up_proj": 2}))
    with pytest.raises(CheckpointError, match=r"is \[.*\], and on this base PEFT wants .*such tensors\)"):
        plan_merge(finished, trained)


def test_what_is_no_adapter_is_refused(finished, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory; --adapter takes what PEFT has saved"):
        plan_merge(finished, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not found; an adapter's directory has one"):
        plan_merge(finished, tmp_path / "empty")
