import json
import signal

import pytest

from qinit.trial import child
from qinit.trial.asked import Answer, Asked
from tests.helpers import quantize


@pytest.fixture
def asked(llama, tmp_path):
    quantize(llama, tmp_path / "run", format="dense")
    return Asked(str(tmp_path / "run"), str(tmp_path / "run/eqft_init"), "LlamaForCausalLM", "whole")


def test_a_process_of_its_own_loads_the_run_and_answers_and_nothing_of_it_is_printed(asked, capfd):
    (answer,) = child.answers(asked)
    assert answer.kind == "done"
    assert answer.what.startswith("loaded by LlamaForCausalLM and PEFT, predictions ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "was ended by SIGKILL (SIGKILL: memory was short)"),
        ("raise SystemExit('no such thing')", "ended with 1: no such thing"),
    ],
)
def test_a_process_that_dies_is_a_finding(code, said, asked, monkeypatch):
    monkeypatch.setattr(child, "CHILD", code)
    assert [*child.answers(asked)] == [Answer("base", f"the process that loads it {said}")]


def test_an_interrupt_ends_the_process(asked, monkeypatch):
    monkeypatch.setattr(
        child,
        "CHILD",
        "import json, time; print(json.dumps({'part': 'base', 'what': 'x'}), flush=True); time.sleep(600)",
    )
    started = []
    real = child.subprocess.Popen

    def start(*args, **options):
        started.append(real(*args, **options))
        return started[0]

    monkeypatch.setattr(child.subprocess, "Popen", start)
    answers = child.answers(asked)
    assert next(answers) == Answer("base", "x")
    answers.close()
    assert started[0].poll() is not None


def test_what_cannot_be_loaded_is_one_answer_without_the_path(asked, monkeypatch, capfd):
    (lost := asked.run + "/model.safetensors")
    import os

    os.truncate(lost, 100)
    told = []
    monkeypatch.setattr(os, "fdopen", lambda *_, **__: Told(told))
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    child.main(json.dumps(vars(asked)))
    (answer,) = [Answer(**json.loads(line)) for line in told]
    assert answer.grave
    assert answer.what.startswith("cannot be loaded (")


class Told:
    """Takes the lines of an answer."""

    def __init__(self, lines):
        self.lines = lines

    def write(self, line):
        self.lines.append(line)
