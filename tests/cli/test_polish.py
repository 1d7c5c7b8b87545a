"""`qinit polish` as a user runs it."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from qinit.runner import polished
from qinit.train.polish import polish
from tests.broken_off import result_in
from tests.helpers import contents, edit_json, edit_tensors

QUICK = ("--rank", 4, "--calibration", "random", "--calibration-samples", 32, "--calibration-length", 32, "--polish", 0)


@pytest.fixture
def made(command, strong_llama):
    """A run in `out`, with its model under a relative name."""
    shutil.copytree(strong_llama, "model")
    assert command("eqft", "model", *QUICK, "--out", "out")[0] == 0
    return Path("out")


def report(directory="out"):
    return json.loads(Path(directory, "qinit.json").read_text())


def test_a_run_is_replaced_by_what_it_was_polished_to(command, made):
    before = contents(made)
    code, out, err = command("polish", "out", "--steps", 5)
    assert (code, err) == (0, "")
    assert "note: this polish takes about " in out
    assert "polish, step 5: loss " in out
    found = report()
    words = found["totals"]["calibration"]["polish"]
    assert f"5 steps on {words['text']}, held-out loss {words['held_out_before']:.4f} -> " in out
    assert "written to" in out
    assert "few tokens" not in out
    assert contents(made).keys() == before.keys()
    first, second = found["command"].split("\n")
    assert first.startswith("qinit eqft model --rank 4 ")
    assert second == "qinit polish out --steps 5"
    assert f"```\n{found['command']}\n```" in Path("out/README.md").read_text()
    code, out, err = command("verify", "out", "--source", "model")
    assert (code, err) == (0, "")
    assert "out: sound (" in out
    assert sorted(path.name for path in Path().iterdir()) == ["model", "out"]


def test_elsewhere_with_other_text_as_json(command, made):
    before = contents(made)
    text = ("--calibration", "random", "--calibration-samples", 80, "--calibration-length", 16, "--seed", 4)
    code, out, err = command("polish", "out", "--steps", 4, *text, "--out", "other", "--json")
    assert code == 0
    value = json.loads(out)
    assert value["directory"] == str(Path("other").resolve())
    assert value["gained"]
    assert value["totals"]["calibration"]["polish"]["text"] == "336 samples of 16 random tokens, seed 4"
    assert value["totals"]["calibration"]["text"] == "32 samples of 32 random tokens, seed 0"
    assert value["recipe"] == report("out")["recipe"]
    assert "polish, step 4" in err
    assert contents(made) == before
    code, _, err = command("polish", "out", "--steps", 4, "--out", "other")
    assert (code, err.count("\n")) == (2, 1)
    assert "other: exists; pass --overwrite to replace it" in err
    assert command("polish", "out", "--steps", 4, "--out", "other", "--overwrite", "--quiet") == (0, "", "")


def test_nothing_gained_is_said_and_is_no_error(command, made, monkeypatch):
    monkeypatch.setattr("qinit.runner.polished.polish", partial(polish, learning_rate=0.0, stretch_rate=0.0))
    before = contents(made)
    code, out, err = command("polish", "out", "--steps", 2)
    assert (code, err) == (0, "")
    assert out.endswith("nothing was gained, so nothing was written: out is as it was\n")
    code, out, err = command("polish", "out", "--steps", 2, "--out", "other", "--json")
    assert code == 0
    assert (json.loads(out)["gained"], json.loads(out)["directory"]) == (False, str(made.resolve()))
    assert contents(made) == before
    assert sorted(path.name for path in Path().iterdir()) == ["model", "out"]


def test_an_interrupt_says_what_is_kept_and_the_same_command_goes_on(command, made, monkeypatch):
    shutil.copytree("out", "kept")
    assert command("polish", "out", "--steps", 5)[0] == 0
    wanted = result_in(made)
    shutil.rmtree("out")
    Path("kept").rename("out")
    before = contents(made)

    def interrupted(*arguments, **options):
        for event in polish(*arguments, **options):
            yield event
            if event.step == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(polished, "polish", interrupted)
        code, _, err = command("polish", "out", "--steps", 5)
    assert code == 130
    assert err == "error: interrupted; 14 of 14 layers are kept, the same command goes on from there\n"
    assert contents(made) == before
    code, _, err = command("polish", "out", "--steps", 6)
    assert code == 2
    assert "polish was 5, now 6; to go on with it ask for the same again, to start anew pass --overwrite" in err
    code, out, err = command("polish", "out", "--steps", 5)
    assert (code, err) == (0, "")
    assert "resuming: 14 of 14 layers were finished (started 2" in out
    assert result_in(made) == wanted


def refused(command, *arguments):
    """Return the one line that a command ends with, exit code 2."""
    code, _, err = command("polish", *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    return err


def test_what_is_refused_is_one_line_and_the_run_is_as_it_was(command, made, tmp_path):
    before = contents(made)
    assert "nowhere: no such directory; pass the directory that `qinit eqft` wrote" in refused(command, "nowhere")
    assert "steps: expected at least 1, found 0" in refused(command, "out", "--steps", 0)
    assert "gone.txt: no such file" in refused(command, "out", "--calibration", "gone.txt")
    Path("model").rename("moved")
    line = refused(command, "out")
    assert line.endswith("out was made from it: say where it is now with --model\n")
    edit_tensors(Path("moved/model.safetensors"), lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert "moved: is not the model that out was made from: tensor 'model.norm.weight' has other values" in refused(
        command, "out", "--model", "moved"
    )
    Path("moved").rename("model")
    (made / "notes.txt").write_text("mine")
    assert "would be lost when it is replaced: notes.txt; move it elsewhere, or leave the run" in refused(
        command, "out"
    )
    (made / "notes.txt").unlink()
    assert contents(made) == before
    edit_json(made / "eqft_init/adapter_config.json", lambda config: config.update(lora_dropout=0.1))
    assert "the adapter was trained or replaced; needed is the start" in refused(command, "out")
    assert sorted(path.name for path in Path().iterdir()) == ["model", "out"]
