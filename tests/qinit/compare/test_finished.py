"""A comparison that starts from finished runs, as a user asks for it."""

import shutil
from pathlib import Path

import pytest

from qinit.compare.finished import finished_row
from qinit.errors import CheckpointError, ReportError
from qinit.source.checkpoint import Checkpoint
from tests.compared import STARTS, TEXT, TRAINING, TUNING, cells, result
from tests.models import make_checkpoint

QUANTIZING = ("--bits", 2, "--rank", 4, "--calibration", "none", "--no-check", "--format", "dense")


@pytest.fixture
def run(command, strong_reader):
    """A finished run in the directory `run`, beside the texts of a comparison."""
    Path("test.txt").write_text(TEXT)
    Path("train.txt").write_text(TRAINING)
    assert command("eqft", strong_reader, *QUANTIZING, "--out", "run")[0] == 0
    return Path("run")


def test_a_run_is_a_row_that_is_as_if_solved_here_and_stays(command, run, strong_reader):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = ("compare", strong_reader, *STARTS[2:], *TUNING, "--ceilings", "none", "--learning-rates", 0.01)
    assert command(*arguments, "--run", run)[0] == 0
    (row,) = result()["rows"]
    assert (row["method"], row["bits"], row["failed"]) == ("run", 2, [])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    kept = cells()
    assert command(*arguments, "--run", run, "--methods", "eqft:none")[0] == 0
    solved, again = result()["rows"]
    assert [solved["method"], again["method"]] == ["eqft:none", "run"]
    for key in ("bits_per_weight", "trainable", "weight_error", "start", "end"):
        assert solved[key] == again[key] == row[key]
    assert {name: cells()[name] for name in kept} == kept  # reused


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda run: (run / "eqft_init/adapter_model.safetensors").write_bytes(b""), ReportError, "was changed since"),
        (lambda run: (run / "qinit.json").unlink(), ReportError, "--run: run.*no such file"),
        (lambda run: shutil.rmtree(run), ReportError, "--run: run: no such directory"),
    ],
)
def test_what_is_no_finished_run_is_refused(run, strong_reader, damage, error, message):
    damage(run)
    with pytest.raises(error, match=message):
        finished_row(run, Checkpoint.open(strong_reader), (), trust_remote_code=False)


def test_a_run_of_another_model_is_refused(command, run, tmp_path):
    other = make_checkpoint(tmp_path / "other", hidden_size=96)
    with pytest.raises(CheckpointError, match=r"--run: .*other: is not the model that run was made from"):
        finished_row(run, Checkpoint.open(other), (), trust_remote_code=False)
