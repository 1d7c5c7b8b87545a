import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/qwen.sh"


@pytest.fixture
def qwen(tmp_path):
    """Return a function that runs the script with a stand-in for qinit, which prints each argument on a line."""
    stand_in = tmp_path / "bin/qinit"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)

    def run(*arguments, **environment):
        path = f"{stand_in.parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", SCRIPT, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": path, **environment},
            check=False,
        )

    return run


@pytest.mark.parametrize(("size", "ceilings"), [("0.5B", "lora,full"), ("3B", "lora,full"), ("7B", "lora")])
def test_the_command_is_one_that_compare_takes(qwen, size, ceilings):
    from qinit_cli.compare import compare

    done = qwen(size, "--dry-run")
    assert done.returncode == 0, done.stderr
    hours, command, model, *options = done.stdout.splitlines()
    assert hours.startswith(f"Qwen2.5-{size}: about ")
    assert (command, model) == ("compare", f"Qwen/Qwen2.5-{size}")
    flags = {word[2:].replace("-", "_") for word in options if word.startswith("--")}
    assert flags <= set(compare.__annotations__)
    assert options[options.index("--ceilings") + 1] == ceilings
    assert options[-1] == "--dry-run"


def test_hours_go_with_the_work_and_the_speed(qwen):
    def hours(*arguments, **environment):
        return float(qwen(*arguments, **environment).stdout.split("about ")[1].split()[0])

    assert 3 < hours("0.5B") < hours("3B") < hours("7B") < 48
    # 16 rows x 7.6e9 parameters x (5 x 6 x 3.28M + 6 x 2 x 0.8M tokens) / 100 TFLOP/s, and 6 h for the starts
    assert hours("7B", TFLOPS="100") == round(16 * 7.6e9 * (30 * 200 * 16 * 1024 + 9.6e6) / 1e14 / 3600 + 6)


@pytest.mark.parametrize(("arguments", "message"), [((), "usage: "), (("70B",), "error: no size '70B'; usage: ")])
def test_a_size_that_there_is_not(qwen, arguments, message):
    done = qwen(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stdout == ""


def test_it_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
