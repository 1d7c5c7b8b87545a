"""A run that is broken off, as a user sees it."""

import json
import os
import signal
from pathlib import Path

import pytest

from qinit.runner import layer as layer_module
from qinit.workplace.lock import locked
from qinit.workplace.place import partial_of

QUICK = ("--rank", 4, "--iter", 1, "--calibration", "none", "--out", "out")


@pytest.fixture
def end_at(monkeypatch):
    """Return a function that lets the solve of this number call `end` instead."""
    real = layer_module.solve

    def at(number, end):
        calls = iter(range(1, 100))

        def solve(*arguments):
            if next(calls) == number:
                end()
            return real(*arguments)

        monkeypatch.setattr(layer_module, "solve", solve)

    return at


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise ZeroDivisionError("boom")


@pytest.mark.parametrize("end", [interrupt, terminate])
def test_an_interrupt_says_what_is_kept_and_the_same_command_goes_on(command, tiny_llama, end_at, end):
    before = signal.getsignal(signal.SIGTERM)
    end_at(4, end)
    code, _, err = command("eqft", tiny_llama, *QUICK)
    assert (code, err) == (
        130,
        "error: interrupted; 3 of 14 layers are kept, the same command goes on from there\n",
    )
    assert signal.getsignal(signal.SIGTERM) is before
    assert not Path("out").exists()
    end_at(0, end)
    code, out, err = command("eqft", tiny_llama, *QUICK)
    assert (code, err) == (0, "")
    assert "resuming: 3 of 14 layers were finished (started 2" in out
    assert out.count(".weight: error ") == 11
    assert "100% " in out
    assert sorted(path.name for path in Path().iterdir()) == ["out"]


def test_an_error_inside_qinit_says_it_too(command, tiny_llama, end_at):
    end_at(3, fail)
    code, _, err = command("eqft", tiny_llama, *QUICK)
    assert code == 1
    assert err == (
        "error: inside qinit: ZeroDivisionError: boom (run again with --debug and please report it); "
        "2 of 14 layers are kept, the same command goes on from there\n"
    )


def test_other_options_are_refused_in_one_line_and_overwrite_starts_anew(command, tiny_llama, end_at):
    end_at(3, interrupt)
    command("eqft", tiny_llama, *QUICK)
    end_at(0, interrupt)
    code, _, err = command("eqft", tiny_llama, *QUICK, "--bits", 3, "--seed", 5)
    assert code == 2
    assert err.startswith("error: out: an unfinished run for something else lies there, started 2")
    assert "(2 of 14 layers are kept): bits was 2, now 3; seed was 0, now 5; to go on with it" in err
    assert err.count("\n") == 1
    assert partial_of(Path("out")).exists()
    code, out, err = command("eqft", tiny_llama, *QUICK, "--bits", 3, "--seed", 5, "--overwrite")
    assert (code, err) == (0, "")
    assert "starting anew: an unfinished run of 2" in out
    assert json.loads(Path("out/qinit.json").read_text())["recipe"]["bits"] == 3


def test_json_is_alone_on_stdout(command, tiny_llama, end_at):
    end_at(3, interrupt)
    command("eqft", tiny_llama, *QUICK)
    end_at(0, interrupt)
    code, out, err = command("eqft", tiny_llama, *QUICK, "--json")
    assert code == 0
    assert len(json.loads(out)["layers"]) == 14
    assert "resuming: 2 of 14 layers" in err


def test_two_runs_at_once(command, tiny_llama):
    with locked(partial_of(Path("out")) / "lock", Path("out"), "qinit eqft the first"):
        code, _, err = command("eqft", tiny_llama, *QUICK)
    assert (code, err.count("\n")) == (2, 1)
    assert f"out: another run is at work on it (process {os.getpid()} on " in err
    assert err.endswith(": qinit eqft the first); wait for it, or choose another place with --out\n")


def test_a_partial_directory_that_is_a_link_is_refused(command, tiny_llama):
    Path("elsewhere").mkdir()
    partial_of(Path("out")).symlink_to("elsewhere")
    code, _, err = command("eqft", tiny_llama, *QUICK)
    assert code == 2
    assert ".out.partial: is a link, and no directory of qinit's; remove it" in err
    assert list(Path("elsewhere").iterdir()) == []
