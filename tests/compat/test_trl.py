"""TRL's SFTTrainer on a run, with the script that `qinit trainer-config` writes; others: `make test-compat`."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

from qinit.trainers import TRAINERS
from tests.compat.trainers.attempt import Attempt, make_runs

pytest.importorskip("trl", reason="pip install trl")
pytest.importorskip("datasets", reason="pip install 'qinit[datasets]'")


def here(command, place):
    """Run a script in this process, which has imported everything."""
    before = Path.cwd()
    os.chdir(place)
    try:
        runpy.run_path(command[1], run_name="__main__")
    finally:
        os.chdir(before)


def test_the_start_is_kept_the_loss_falls_and_a_break_changes_nothing(tmp_path):
    run = make_runs(tmp_path, ("dense",))["dense"]
    Attempt(TRAINERS["trl"], run, tmp_path / "trl", here).check()


def test_a_peft_config_makes_an_adapter_that_repairs_nothing(tmp_path):
    """As docs/trainers/trl.md says of it."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    run = make_runs(tmp_path, ("dense",))["dense"]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(run, dtype="auto"),
        processing_class=AutoTokenizer.from_pretrained(run),
        train_dataset=Dataset.from_list([{"text": "w5 w6"}]),
        args=SFTConfig(output_dir=str(tmp_path / "out"), bf16=False, report_to="none"),
        peft_config=LoraConfig.from_pretrained(run, subfolder="eqft_init"),
    )
    second = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert second
    assert not any(value.any() for value in second)
