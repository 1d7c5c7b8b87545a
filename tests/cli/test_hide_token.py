import json
import os
import sys

import pytest
from qinit_cli import hide_token as module
from qinit_cli.hide_token import HIDDEN, VARIABLE, hide_token


class Replaced(Exception):  # noqa: N818 - no error
    pass


@pytest.fixture
def program(monkeypatch):
    """Return a function that starts `python -m qinit_cli.main ARGUMENTS` as far as the exec: its words and variables,
    None when there is none; and one that goes on from there: what `sys.argv` is then."""

    def execve(path, words, environment):
        assert path == sys.executable
        raise Replaced(words, environment)

    monkeypatch.setattr(module.os, "execve", execve)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "qinit_cli.main", *arguments])
        try:
            hide_token()
        except Replaced as replaced:
            return replaced.args
        return None

    def go_on(words, environment):
        monkeypatch.setattr(sys, "argv", ["main.py", *words[3:]])
        monkeypatch.setattr(sys, "orig_argv", words)
        monkeypatch.setenv(VARIABLE, environment[VARIABLE])
        hide_token()
        assert VARIABLE not in os.environ
        return sys.argv[1:]

    return start, go_on


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        (["push", "d", "me/x", "--token", "hf_a"], ["push", "d", "me/x", "--token", HIDDEN]),
        (["push", "--token=hf_a", "hf_a"], ["push", f"--token={HIDDEN}", "hf_a"]),
        (["eqft", "--token", "hf_a", "--token=hf_b"], ["eqft", "--token", HIDDEN, f"--token={HIDDEN}"]),
        (["eqft", "--token", ""], ["eqft", "--token", HIDDEN]),
        (["eqft", "--token", "--token=x\ny"], ["eqft", "--token", HIDDEN]),
    ],
)
def test_the_title_has_no_token_and_the_program_has_it(program, arguments, title):
    start, go_on = program
    words, environment = start(*arguments)
    assert words == ["python", "-m", "qinit_cli.main", *title]
    assert environment.items() >= os.environ.items()
    assert go_on(words, environment) == arguments


def test_without_a_token_nothing_happens(program):
    start, _ = program
    assert start("eqft", "--bits", "2") is None
    assert start("eqft", "--token") is None
    assert start("eqft", "--tokenizer", "x") is None


def test_a_call_from_python_is_left_alone(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qinit", "eqft", "--token", "hf_a"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "script.py"])
    hide_token()
    assert sys.argv == ["qinit", "eqft", "--token", "hf_a"]


def test_where_it_cannot_start_again_it_goes_on(program, monkeypatch):
    def refuse(*_):
        raise OSError("argument list too long")

    monkeypatch.setattr(module.os, "execve", refuse)
    start, _ = program
    assert start("eqft", "--token", "hf_a") is None
    assert sys.argv == ["main.py", "eqft", "--token", "hf_a"]


def test_what_is_carried_is_a_list_in_json(program):
    _, environment = program[0]("eqft", "--token", "hf_ä")
    assert json.loads(environment[VARIABLE]) == ["hf_ä"]
