"""`qinit doctor` as a user runs it: here, and where packages are missing."""

from __future__ import annotations

import contextlib
import json
from functools import cache
from pathlib import Path

import pytest

from qinit.doctor.examine import _row
from qinit.doctor.probes import _attempt, _source
from tests.cli.test_main import process

HIDING = Path(__file__).parent / "hiding"
GPTQ = 'pip install "gptqmodel>=7.6,<7.7" "optimum>=2.3"'


def without(*packages, cwd, arguments=()):
    hidden = {"PYTHONPATH": str(HIDING), "QINIT_TEST_HIDDEN": ",".join(packages)}
    return process("doctor", *arguments, cwd=cwd, **hidden)


def here(module, probes, place, limit):
    """Try the probes in this process, which has imported most of what they need."""
    with contextlib.chdir(place):
        for name, probe in probes.items():
            answer = _attempt(probe)
            yield _row(name, probe, answer["state"], answer["seconds"], answer["detail"])


def test_everything_that_is_installed_here_works(command, monkeypatch):
    pytest.importorskip("gptqmodel", reason="pip install 'qinit[gptq]'")
    monkeypatch.setattr("qinit.doctor.examine._child", here)
    monkeypatch.setattr("qinit.doctor.probes._source", cache(_source.__wrapped__))
    code, out, _ = command("doctor", "--json")
    assert code == 0
    value = json.loads(out.splitlines()[-1])  # others print, too
    assert value["works"] is True
    rows = {row["name"]: row for row in value["probes"]}
    assert {"torch", "kernel", "dense", "calibrated", "gptq-2", "gptq-3", "gptq-4", "gptq-8", "mixed"} < rows.keys()
    failed = {name: row["detail"] for name, row in rows.items() if row["state"] == "fails"}
    assert failed == {}
    assert all(row["detail"].endswith("not installed") for name, row in rows.items() if row["pip"])
    assert rows["mixed"]["detail"].startswith("loss ")
    installed = {package["name"]: package for package in value["packages"]}
    assert installed["torch"]["met"]
    assert value["machine"]["cores"] >= 1
    assert value["trainers"] == []  # what is pinned for the tests goes together
    assert list(Path.cwd().iterdir()) == []


def test_where_torch_is_missing_it_says_so_and_how_to_get_it(tmp_path):
    result = without("torch", "optimum", "trl", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert any(line.split()[:3] == ["torch", "-", ">=2.4"] and line.endswith("not installed") for line in lines)
    assert any(line.startswith("absent  numba kernel ") for line in lines)
    assert any(
        line.endswith('torch and optimum not installed; pip install "torch>=2.4" "optimum>=2.3"') for line in lines
    )
    assert lines[-2].startswith("to get all of it: pip install ")
    assert {'"torch>=2.4"', '"optimum>=2.3"', '"trl"'} <= set(lines[-2].split())
    assert lines[-1] == "qinit does not work here"


def test_where_the_extras_are_missing_qinit_works_and_each_is_a_row_with_its_command(tmp_path):
    extras = ("gptqmodel", "optimum", "datasets", "matplotlib", "plotly", "trl", "bitsandbytes")
    result = without(*extras, cwd=tmp_path, arguments=("--json",))
    assert (result.returncode, result.stderr) == (0, "")
    value = json.loads(result.stdout)
    commands = {row["name"]: row["pip"] for row in value["probes"] if row["state"] == "absent" and row["pip"]}
    assert commands == {
        "datasets": 'pip install "datasets>=3"',
        "report": 'pip install "matplotlib>=3.8" "plotly>=6"',
        "sft": 'pip install "trl" "datasets>=3"',
        "bitsandbytes": 'pip install "bitsandbytes"',
        **dict.fromkeys(("gptq-2", "gptq-3", "gptq-4", "gptq-8", "mixed", "gptqmodel"), GPTQ),
    }
    assert {row["name"] for row in value["probes"] if row["state"] == "works"} >= {"dense", "calibrated", "trainer"}
    assert not [row["detail"] for row in value["probes"] if row["state"] == "fails"]
    assert all(name in value["pip"] for name in extras)


def test_quiet_leaves_the_exit_code(tmp_path):
    result = without("torch", cwd=tmp_path, arguments=("--quiet",))
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "")
