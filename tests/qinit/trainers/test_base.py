import json

import pytest

from qinit.errors import CheckpointError, ReportError
from qinit.trainers import TRAINERS, TrainableRun
from qinit.trainers.training import Training
from tests.helpers import edit_json, quantize
from tests.models import make_checkpoint

TRAINING = Training.on("train.jsonl")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("trainers")
    quantize(make_checkpoint(place / "llama"), place / "run", format="dense")
    return place


@pytest.fixture
def run(place, tmp_path):
    """A copy of qinit.json and the adapter, to be changed."""
    import shutil

    return shutil.copytree(place / "run", tmp_path / "run")


def refused(run):
    """The trainers that cannot take a run, each with its reason."""
    opened = TrainableRun.open(run)
    reasons = {name: trainer.cannot_take(opened) for name, trainer in TRAINERS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def change_report(run, **changes):
    def change(report):
        report["recipe"] |= {key: value for key, value in changes.items() if key in report["recipe"]}
        report["source"] |= {key: value for key, value in changes.items() if key in report["source"]}
        if "widths" in changes:
            for row, bits in zip(report["layers"], changes["widths"], strict=False):
                row["bits"] = bits

    edit_json(run / "qinit.json", change)


def test_a_dense_run_is_taken_by_all_but_those_that_take_none(run):
    assert refused(run).keys() == {"torchtune", "mlx-lm"}


def test_a_packed_run_is_not_for_those_that_read_weights(run):
    change_report(run, format="gptq")
    assert refused(run).keys() == {"unsloth", "torchtune", "mlx-lm"}
    assert "--format dense" in refused(run)["unsloth"]


def test_packed_mixed_widths_are_for_scripts_that_load_with_qinit(run):
    change_report(run, format="gptq", widths=[2, 3])
    assert TRAINERS.keys() - refused(run).keys() == {"transformers", "trl"}
    assert "qinit.load" in refused(run)["llama-factory"]
    text = TRAINERS["trl"].config(TrainableRun.open(run), TRAINING)
    assert f"model = qinit.load({json.dumps(str(run))}, trainable=True)" in text


def test_a_model_of_another_kind_is_for_transformers_or_for_a_script_of_one_s_own(run):
    change_report(run, **{"class": "BertForMaskedLM"})
    assert TRAINERS.keys() - refused(run).keys() == {"transformers"}
    assert "mlm=True" in TRAINERS["transformers"].config(TrainableRun.open(run), TRAINING)
    change_report(run, **{"class": "BertForSequenceClassification"})
    assert refused(run).keys() == TRAINERS.keys()
    assert "README.md" in refused(run)["transformers"]


@pytest.mark.parametrize("name", ["transformers", "trl", "llama-factory", "axolotl", "unsloth", "ms-swift"])
def test_code_of_the_model_s_own_is_run_only_where_the_run_was_made_so(run, name):
    opened = TrainableRun.open(run)
    assert "trust_remote_code" not in TRAINERS[name].config(opened, TRAINING)
    change_report(run, trust_remote_code=True)
    if name != "ms-swift":  # it always does
        assert "trust_remote_code" in TRAINERS[name].config(TrainableRun.open(run), TRAINING)


def test_what_is_no_run_is_said_to_be_none(run, tmp_path):
    with pytest.raises(ReportError, match="no such directory"):
        TrainableRun.open(tmp_path / "none")
    change_report(run, format="punched-cards")
    with pytest.raises(CheckpointError, match="names no format that this qinit knows"):
        TrainableRun.open(run)
    change_report(run, format="dense")
    (run / "eqft_init" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="adapter_config"):
        TrainableRun.open(run)
