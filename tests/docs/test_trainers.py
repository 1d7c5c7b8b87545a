"""The pages of docs/trainers hold what `qinit trainer-config` writes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qinit.trainers import TRAINERS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs/trainers"


def block(name):
    """The file that a trainer's page shows, None for a trainer that takes no run."""
    _, found, rest = (PAGES / f"{name}.md").read_text(encoding="utf-8").partition("` writes:\n\n```")
    return rest.partition("\n")[2].partition("\n```\n")[0] if found else None


def test_the_pages_are_current():
    script = [sys.executable, str(ROOT / "docs/trainer_files.py"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_written_is_read_by_its_language_and_names_base_and_start(name):
    text = block(name)
    if text is None:
        assert TRAINERS[name].suffix == ""
        return
    match TRAINERS[name].suffix:
        case ".py":
            ast.parse(text)
        case ".yaml":
            values = yaml.safe_load(text)
            assert "/runs/Qwen2.5-7B-2bit-16rank" in values.values()
            assert "/runs/Qwen2.5-7B-2bit-16rank/eqft_init" in values.values()
        case ".sh":
            subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    assert max(map(len, text.splitlines())) <= 120
    assert all(command in (PAGES / f"{name}.md").read_text("utf-8") for command in TRAINERS[name].install)
    assert all(command in (PAGES / f"{name}.md").read_text("utf-8") for command in TRAINERS[name].packed_install)
