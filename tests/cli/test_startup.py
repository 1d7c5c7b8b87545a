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
SCRIPT = """
import contextlib, io, json, sys
from qinit_cli import main
sys.argv = ["qinit", *sys.argv[1:]]
with contextlib.redirect_stdout(io.StringIO()) as out:
    try:
        main.main()
    except SystemExit as stop:
        code = stop.code or 0
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules}), out.getvalue()]))
"""


def modules_of(*arguments):
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command):
    code, modules, out = modules_of(*filter(None, [command]), "--help")
    assert code == 0
    assert f"Usage: qinit {command}".rstrip() in out
    assert "typer" in modules
    assert set(modules) & HEAVY == set()


def test_every_command_is_in_the_help():
    _, _, out = modules_of("--help")
    assert {"eqft", "meqft", "plan", "report", "verify", "doctor"} <= set(COMMANDS)
    assert all(f" {command} " in out for command in COMMANDS)


def test_the_version_needs_nothing_either():
    code, modules, out = modules_of("--version")
    assert (code, out.count("\n")) == (0, 1)
    assert set(modules) & HEAVY == set()
