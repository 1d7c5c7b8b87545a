"""docs/commands.md is what the command line's help says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from qinit_cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("environment", [{}, {"COLUMNS": "40", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "true"}])
def test_the_page_is_current_and_the_same_in_every_terminal(environment):
    script = [sys.executable, str(ROOT / "docs/commands.py"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_section(command):
    section = PAGE.split(f"\n## qinit {command}\n")[1].split("\n## ")[0]
    assert section.startswith(f"\n```text\nqinit {command} [OPTIONS]")
    assert "\n- `--" in section


def test_names_types_and_defaults_are_where_they_belong():
    assert "\n- `--bits <int>`: 2, 3, 4 or 8. Default: `2`.\n" in PAGE
    assert "\n- `--act-order, --no-act-order`: Round the columns with the largest inputs first.\n" in PAGE
    assert "\n- `--tasks A,B`: Tasks of lm-evaluation-harness" in PAGE
    assert "\n- `--overwrite`: Replace an earlier run's directory.\n" in PAGE
    assert "\n- `REPO_ID <str>`: OWNER/NAME on the Hub; made if it is missing. Required.\n" in PAGE


def test_nothing_of_this_machine_is_in_it():
    assert str(Path.home()) not in PAGE
    assert str(ROOT) not in PAGE
