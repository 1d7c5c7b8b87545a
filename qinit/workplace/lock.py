"""A lock that keeps two runs out of one directory, and that a dead owner does not hold.

The system's own lock (flock) ends with its process. What the file says of its owner is for messages, and for shared
disks where flock does nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from qinit.errors import OutputError
from qinit.words import moment

ATTEMPTS = 100  # to open the file before another run removes it again


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock. `born` is when it started, in the system's own ticks, and `boot` names the
    system's start: together they tell a process from a later one of the same number. None: not to be had here."""

    host: str
    pid: int
    born: str | None
    boot: str | None
    since: str
    command: str

    @classmethod
    def here(cls, command: str) -> Owner:
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _born(pid), _boot(), datetime.now(UTC).isoformat(), command)

    @classmethod
    def read(cls, descriptor: int) -> Owner | None:
        """Read what `write` has written; None for anything else, such as a file that its owner died over."""
        try:
            owner = cls(**json.loads(os.pread(descriptor, 1 << 16, 0)))
            return owner if type(owner.pid) is int and owner.pid > 0 and isinstance(owner.since, str) else None
        except (ValueError, TypeError, RecursionError):
            return None

    def write(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(self)).encode(), 0)

    def elsewhere(self, here: Owner) -> bool:
        """Whether it lives on a machine of which nothing can be seen from here."""
        return self.host != here.host and (self.boot != here.boot or self.boot is None)

    def alive(self, here: Owner) -> bool:
        """Whether it is a process of this machine that still runs."""
        if self.boot != here.boot:
            return False
        if self.born is not None:
            return _born(self.pid) == self.born
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


@contextmanager
def locked(file: Path, out: Path, command: str) -> Iterator[None]:
    """Hold the lock `file`, in a directory that is made where it is missing; `out` is what it keeps others from.

    Raises OutputError while another run holds it, with who that is, and OSError.
    """
    descriptor = _acquired(file, out)
    try:
        here = Owner.here(command)
        owner = Owner.read(descriptor)
        if owner is not None and owner.elsewhere(here):
            raise OutputError(f"{_busy(out, owner)}; if that run is dead, remove {file} and start again")
        if owner is not None and owner.alive(here):
            raise OutputError(f"{_busy(out, owner)}; wait for it, or choose another place with --out")
        here.write(descriptor)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _acquired(file: Path, out: Path) -> int:
    """Open the file and lock it; the one that is at its place then, not one that another run has just removed."""
    for _ in range(ATTEMPTS):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = Owner.read(descriptor)
            os.close(descriptor)
            raise OutputError(f"{_busy(out, owner)}; wait for it, or choose another place with --out") from None
        except OSError:
            pass  # a file system without it: the owner's name has to do
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)
    raise OutputError(f"{file}: appears and disappears; is another run at work on {out}?")


def _busy(out: Path, owner: Owner | None) -> str:
    if owner is None:
        return f"{out}: another run is at work on it"
    who = f"process {owner.pid} on {owner.host} since {moment(owner.since)}"
    return f"{out}: another run is at work on it ({who}{': ' if owner.command else ''}{owner.command})"


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # no Linux
        return None


def _born(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; None where it is gone, or dead and only not buried."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *numbers = stat.rpartition(")")[2].split()
    return None if state in "ZX" else numbers[18]
