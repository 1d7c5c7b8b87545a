import json

import pytest

from qinit.adapters.lora import LoraAdapter
from qinit.events import Noted
from qinit.runner.loadable import LOST, is_lost
from qinit.runner.run import run
from tests.helpers import plan_of, quantize
from tests.models import make_checkpoint


@pytest.mark.parametrize(("family", "form"), [("llama", "gptq"), ("bert", "dense"), ("t5", "dense")])
def test_a_run_that_stock_loaders_find_whole_has_no_such_note(family, form, tmp_path):
    report = quantize(make_checkpoint(tmp_path / "source", family), tmp_path / "run", format=form, check=True)
    assert not is_lost(report.notes)


@pytest.fixture
def spoil(monkeypatch):
    """Let the adapter's configuration name other modules than the plan has."""
    real = LoraAdapter.config

    def name(*modules):
        monkeypatch.setattr(LoraAdapter, "config", lambda *given: {**real(*given), "target_modules": [*modules]})

    return name


def test_a_run_of_which_they_would_lose_a_part_says_so_in_a_note_and_in_its_report(llama, tmp_path, spoil):
    plan = plan_of(llama, format="dense", check=True)
    spoil("q_proj")
    events = [*run(plan, tmp_path / "run")]
    (note,) = [each.text for each in events if isinstance(each, Noted)]
    assert note.startswith(f"{LOST}PEFT drops base_model.model.model.layers.0.mlp.down_proj.lora_A.weight, ")
    assert note in json.loads((tmp_path / "run/qinit.json").read_text())["notes"]
    assert is_lost([note])


def test_what_peft_refuses_is_said_without_this_machine_s_directories(llama, tmp_path, spoil):
    plan = plan_of(llama, format="dense", check=True)
    spoil("nothing")
    (note,) = [each.text for each in run(plan, tmp_path / "run") if isinstance(each, Noted)]
    assert note.startswith(f"{LOST}the run/eqft_init: PEFT cannot load it (")
    assert str(tmp_path) not in note


def test_without_a_check_nobody_looks(llama, tmp_path, monkeypatch):
    plan = plan_of(llama, format="dense")
    monkeypatch.setattr("qinit.runner.loadable.lost_names", lambda *_, **__: ["all of it"])
    assert not [event for event in run(plan, tmp_path / "run") if isinstance(event, Noted)]
