import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qinit import __version__
from qinit.formats import FORMATS
from qinit.runner import layer as layer_module
from tests.helpers import weights_of
from tests.models import words


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


def test_as_a_process_it_writes_plain_lines_and_nothing_of_others(command, tiny_reader, tmp_path, monkeypatch):
    place = tmp_path / "process"
    place.mkdir()
    (place / "recipe.yaml").write_text("method: lq-lora\nformat: dense\nrank: 4\n")
    (place / "text.txt").write_text(words(*range(3, 80)))
    packed = ("eqft", tiny_reader, "--rank", 4, "--calibration", "none", "--format", "gptq", "--out", "packed")
    short = ("--calibration", "self", "--calibration-samples", 2, "--calibration-length", 8, "--out", "out")
    commands = [
        packed,
        ("eqft", tiny_reader, "--recipe", "recipe.yaml", *short),  # the whole model in memory, loaded by transformers
    ]
    if not FORMATS["gptq"].missing_packages():  # gptqmodel says much when it is imported
        commands += [("eval", "packed", "--text", "text.txt", "--length", 25, "--stream", "never", "--json", "--quiet")]
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    lines = json.dumps([list(map(str, arguments)) for arguments in commands])
    done = subprocess.run([sys.executable, "-c", ONE_BY_ONE, lines], cwd=place)
    assert done.returncode == 0
    assert json.loads((place / "codes").read_text()) == [0] * len(commands)
    outs, errs = ([(place / f"{i}.{name}").read_text() for i in range(len(commands))] for name in ("out", "err"))
    assert errs[:2] == ["", ""]
    assert "\x1b" not in outs[0] + outs[1]
    assert f"{tiny_reader}: 2 bits, rank 4, lq-lora\n" in outs[1]  # however long the name is
    assert all(json.loads(out)["tokens"] == 72 for out in outs[2:])
    assert command(*packed)[0] == 0
    assert weights_of(Path("packed")) == weights_of(place / "packed")


def test_an_unknown_model_of_the_hub_is_one_line_without_the_token(command, hub):
    code, out, err = command("eqft", "someone/tiny", "--token", "hf_secret", "--revision", "v2")
    assert (code, out) == (2, "")
    assert err.startswith("error: someone/tiny at revision v2: no such directory here and no such model")
    assert err.count("\n") == 1
    assert "hf_secret" not in err
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
