"""What a command imports before it has anything to do: time is not measured here, see benchmarks/startup.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from qinit_cli.main import app

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]
HEAVY = {"torch", "transformers", "huggingface_hub", "numpy", "numba", "peft", "accelerate", "datasets", "scipy"}
HEAVY |= {"matplotlib", "plotly", "gptqmodel", "optimum", "safetensors", "yaml", "packaging", "snntorch"}
# What each line of arguments gives, and which of HEAVY is imported by then.
SCRIPT = """
import contextlib, io, json, sys
from qinit_cli import main
heavy, answers = set(sys.argv[1].split()), []
for line in sys.argv[2:]:
    sys.argv = ["qinit", *line.split()]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code or 0
    answers.append([code, out.getvalue(), sorted(heavy & {name.partition(".")[0] for name in sys.modules})])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers():
    """What each line of arguments gives in one process that runs them all: (exit code, stdout, heavy imports)."""
    lines = ["--version", "--help", *(f"{command} --help" for command in COMMANDS)]
    command = [sys.executable, "-c", SCRIPT, " ".join(HEAVY), *lines]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(lines, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command, answers):
    code, out, heavy = answers[f"{command} --help".strip()]
    assert (code, heavy) == (0, [])
    assert f"Usage: qinit {command}".rstrip() in out


def test_what_is_heavy_is_seen():
    assert "typer" not in HEAVY
    result = subprocess.run([sys.executable, "-c", SCRIPT, "typer", "--version"], capture_output=True, text=True)
    assert json.loads(result.stdout)[0][2] == ["typer"]


def test_every_command_is_in_the_help(answers):
    assert {"eqft", "meqft", "plan", "report", "verify", "doctor"} <= set(COMMANDS)
    assert all(f" {command} " in answers["--help"][1] for command in COMMANDS)


def test_the_version_needs_nothing_either(answers):
    code, out, heavy = answers["--version"]
    assert (code, out.count("\n"), heavy) == (0, 1, [])
