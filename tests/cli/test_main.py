import json
import os
import re
import subprocess
import sys

import pytest
import torch

from qinit import __version__
from qinit.runner import layer as layer_module


def process(*arguments, cwd, **environment):
    """Run qinit as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "qinit_cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_without_arguments_it_shows_its_help(command):
    code, out, _ = command()
    assert code in (0, 2)
    assert "eqft" in out


def test_version(command):
    assert command("--version") == (0, __version__ + "\n", "")


def test_an_error_of_the_user_is_one_line_and_2(command):
    code, out, err = command("eqft", "./gone")
    assert (code, out) == (2, "")
    assert err.startswith("error: ./gone: no such directory")
    assert err.count("\n") == 1


def test_debug_shows_the_traceback_before_the_same_line(command):
    code, _, err = command("eqft", "./gone", "--debug")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: ./gone: no such directory")


def test_memory_that_is_used_up_whatever_is_tried_is_one_line_and_2(command, monkeypatch, tiny_llama):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(layer_module, "solve", full)
    code, _, err = command("eqft", tiny_llama, "--rank", 4)
    assert (code, err) == (
        2,
        "error: a device's memory is used up (CUDA out of memory. Tried); use --device cpu, or free it\n",
    )


def test_an_error_inside_qinit_is_one_line_and_1(command, monkeypatch, tiny_llama):
    def boom(*_):
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(layer_module, "solve", boom)
    code, _, err = command("eqft", tiny_llama, "--rank", 4)
    assert code == 1
    assert err == "error: inside qinit: ZeroDivisionError: one two (run again with --debug and please report it)\n"
    code, _, err = command("eqft", tiny_llama, "--rank", 4, "--debug")
    assert code == 1
    assert "Traceback" in err


def test_an_interrupt_is_one_line_and_130_and_leaves_nothing(command, monkeypatch, tiny_llama, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_module, "solve", interrupt)
    code, _, err = command("eqft", tiny_llama, "--rank", 4, "--out", tmp_path / "place/out")
    assert code == 130
    assert err == "error: interrupted; nothing was left behind\n"
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["eqft", "--bits", "two"], ["eqft", "--no-such-option"], ["eqtf"], ["eqft", "a", "b"]]
)
def test_a_wrong_usage_is_2_without_a_traceback(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err
    assert "Traceback" not in err


# Runs commands one after the other in one process, as most of the time that one takes are its imports.
ONE_BY_ONE = """
import json, os, sys
codes = []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    for descriptor, name in (1, "out"), (2, "err"):
        os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    from qinit_cli import main
    sys.argv = ["qinit", *arguments]
    try:
        main.main()
    except SystemExit as stop:
        codes.append(stop.code or 0)
    else:
        codes.append(0)
    sys.stdout.flush()
    sys.stderr.flush()
json.dump(codes, open("codes", "w"))
"""


def test_as_a_process_it_writes_plain_lines_and_nothing_of_others(tiny_llama, tmp_path, hub, monkeypatch):
    place = tmp_path / "cwd"
    place.mkdir()
    (place / "recipe.yaml").write_text("method: lq-lora\nformat: dense\nrank: 4\n")
    short = ("--calibration", "self", "--calibration-samples", 2, "--calibration-length", 8, "--out", "out")
    commands = (
        ("eqft", tiny_llama, "--rank", 4, "--calibration", "none"),
        ("eqft", tiny_llama, "--recipe", "recipe.yaml", *short),  # the whole model in memory, loaded by transformers
        ("eqft", "someone/tiny", "--token", "hf_secret", "--revision", "v2"),
    )
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "other-cache")}
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    words = json.dumps([list(map(str, arguments)) for arguments in commands])
    done = subprocess.run([sys.executable, "-c", ONE_BY_ONE, words], cwd=place, env={**os.environ, **environment})
    assert done.returncode == 0
    first, second, unknown = (
        [(place / f"{number}.{name}").read_text() for name in ("out", "err")] for number in range(3)
    )
    assert json.loads((place / "codes").read_text()) == [0, 0, 2]
    assert (first[1], second[1], unknown[0]) == ("", "", "")
    assert "\x1b" not in first[0] + second[0]
    assert (place / "model_zoo/eqft/tiny-llama-2bit-4rank/qinit.json").is_file()
    assert f"{tiny_llama}: 2 bits, rank 4, lq-lora\n" in second[0]  # however long the name is
    error = unknown[1]
    assert error.startswith("error: someone/tiny at revision v2: no such directory here and no such model")
    assert error.count("\n") == 1
    assert "hf_secret" not in error
    assert {token for _, token in hub.requests} == {"Bearer hf_secret"}


def test_debug_says_at_the_end_where_the_time_of_a_run_went(command, tiny_llama):
    options = ("eqft", tiny_llama, "--rank", 4, "--calibration", "none", "--iter", 1, "--no-check", "--quiet")
    code, out, err = command(*options, "--debug")
    assert (code, out) == (0, "")
    first, *rest = err.splitlines()
    assert re.fullmatch(r"where \d+\.\d s went, those of the host:", first)
    assert all(re.fullmatch(r" +\d+\.\d s +\d+ %  [a-z ]+", line) for line in rest)
    assert {"solving", "reading", "writing", "other"} <= {line.rpartition("  ")[2] for line in rest}
    code, out, err = command(*options, "--overwrite")
    assert (code, out, err) == (0, "", "")


@pytest.mark.parametrize(("rank", "said"), [(0, "error: methods: is done by one process, and 2 were started"), (1, "")])
def test_a_command_for_one_process_is_refused_in_several_and_the_first_says_so(rank, said, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))  # as they are, after the test
    code, out, err = command("methods")
    assert (code, out) == (2, "")
    assert err.startswith(said)
    assert bool(err) is bool(said)
