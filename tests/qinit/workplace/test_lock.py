import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from qinit.errors import OutputError
from qinit.workplace import lock
from qinit.workplace.lock import Owner, locked


@pytest.fixture
def file(tmp_path):
    return tmp_path / "partial/lock"


def written(file, owner):
    file.parent.mkdir()
    file.write_text(json.dumps(asdict(owner)))


def taken(file):
    with locked(file, file.parent.parent / "out", "qinit new"):
        return json.loads(file.read_text())


def test_it_names_its_owner_and_is_gone_at_the_end(file):
    found = taken(file)
    assert (found["pid"], found["command"]) == (os.getpid(), "qinit new")
    assert not file.exists()


def test_a_second_run_is_refused_with_who_has_it(file):
    with locked(file, file.parent.parent / "out", "qinit first"):
        with pytest.raises(OutputError, match=rf"out: another run .*process {os.getpid()} on .*: qinit first\); wait"):
            taken(file)
        assert json.loads(file.read_text())["command"] == "qinit first"
    taken(file)


def test_two_processes(file):
    script = (
        "import sys; from pathlib import Path; from qinit.workplace.lock import locked\n"
        "with locked(Path(sys.argv[1]), Path('out'), 'qinit first'): print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=rf"process {other.pid} on "):
            taken(file)
        other.kill()
        other.wait()
        assert json.loads(file.read_text())["pid"] == other.pid  # it could not remove it
        assert taken(file)["pid"] == os.getpid()


def test_a_dead_owner_that_nobody_has_buried_is_dead(file):
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    written(file, replace(Owner.here("qinit old"), pid=child, born="1"))
    assert lock._born(child) is None
    assert taken(file)["pid"] == os.getpid()
    os.waitpid(child, 0)


def ended():
    """Return the number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.mark.parametrize(
    "change",
    [
        lambda here: {"pid": ended()},
        lambda here: {"pid": ended(), "born": None},
        lambda here: {"born": str(int(here.born) - 1)},
        lambda here: {"boot": "before the reboot"},
        lambda here: {"host": "another-container", "pid": ended()},
    ],
    ids=["gone", "gone, no /proc", "a later process of that number", "before a reboot", "another name of this machine"],
)
def test_the_lock_of_a_dead_owner_is_taken_over(file, change):
    here = Owner.here("qinit old")
    written(file, replace(here, **change(here)))
    assert taken(file)["command"] == "qinit new"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}', b"[" * 10**5, b'{"pid": "x"}'])
def test_a_lock_that_says_nothing_is_taken_over(file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    taken(file)


def test_an_owner_on_another_machine_may_be_alive(file):
    written(file, replace(Owner.here("qinit there"), host="node7", boot="another"))
    with pytest.raises(OutputError, match=rf"on node7 since .*; if that run is dead, remove {file} and start again"):
        taken(file)
    assert file.exists()


@pytest.mark.parametrize("born", [True, False])
def test_where_the_system_locks_nothing_the_owner_has_to_do(file, monkeypatch, born):
    def unsupported(*_):
        raise OSError("not on this disk")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    here = Owner.here("qinit first")
    written(file, here if born else replace(here, born=None))
    with pytest.raises(OutputError, match=r"qinit first\); wait for it"):
        taken(file)


def test_a_lock_that_another_run_removes_meanwhile_is_made_anew(file, monkeypatch):
    real, calls = lock.fcntl.flock, []

    def flock(descriptor, how):
        real(descriptor, how)
        calls.append(descriptor)
        if len(calls) == 1:
            file.unlink()

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    assert taken(file)["pid"] == os.getpid()
    assert len(calls) == 2
