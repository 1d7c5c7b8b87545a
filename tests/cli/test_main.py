import os
import re
import subprocess
import sys

import pytest

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


def test_help_needs_no_torch(tmp_path):
    script = (
        "import sys; from qinit_cli import main; sys.argv = ['qinit', 'eqft', '--help']\n"
        "try: main.main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0
    assert "--group-size" in result.stdout


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


def test_as_a_process_a_run_writes_plain_lines_and_nothing_to_stderr(tiny_llama, tmp_path):
    (tmp_path / "cwd").mkdir()
    result = process("eqft", tiny_llama, "--rank", 4, "--calibration", "none", cwd=tmp_path / "cwd")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert (tmp_path / "cwd/model_zoo/eqft/tiny-llama-2bit-4rank/qinit.json").is_file()


def test_as_a_process_a_run_with_the_whole_model_in_memory_shows_no_bars_of_others(tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("method: lq-lora\nformat: dense\nrank: 4\n")
    options = ("--calibration", "self", "--calibration-samples", 2, "--calibration-length", 8, "--out", "out")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    result = process("eqft", tiny_llama, "--recipe", "recipe.yaml", *options, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{tiny_llama}: 2 bits, rank 4, lq-lora\n" in result.stdout  # however long the name is


def test_as_a_process_an_unknown_hub_model_is_one_line(tmp_path, hub):
    result = process(
        *("eqft", "someone/tiny", "--token", "hf_secret", "--revision", "v2"),
        cwd=tmp_path,
        HF_ENDPOINT=hub.endpoint,
        HF_HUB_OFFLINE="0",
        HF_HUB_CACHE=str(tmp_path / "other-cache"),
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: someone/tiny at revision v2: no such directory here and no such model")
    assert result.stderr.count("\n") == 1
    assert "hf_secret" not in result.stderr
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
