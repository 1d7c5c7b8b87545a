"""Runs the real command line in processes that can be killed, without importing torch anew for each.

Forks is a process that was forked from the tests once everything was imported and before anything was computed: no
threads of OpenMP are lost in a fork. It forks again at once for whatever it is asked: a command, a command that several
processes carry out together, as torchrun starts them, or a function.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

LONGEST = 300.0  # seconds, of what takes a few: a process that takes longer waits for something that will not come


class Forks:
    """A process that forks others."""

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        if not os.fork():
            self._pipe.close()  # else the end of the tests would not be seen
            try:
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def _ask(self, do: Callable[..., Any], *arguments: Any) -> Any:
        _send(self._pipe, (do, arguments))
        result = self._pipe.recv()
        if isinstance(result, TimeoutError):
            raise result
        return result

    def warm_up(self, *arguments: Any) -> None:
        """Run `qinit ARGUMENTS` in the process that forks, so that no other has to load what that takes."""
        assert self._ask(run_command, list(map(str, arguments))) == 0

    def call(self, do: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function, found by its module and name, returns in a process of its own."""
        return self._ask(_called, do, arguments)

    def run(
        self, log: Path, *arguments: Any, kill_after: float | None = None, directory: Path = Path()
    ) -> tuple[int, float]:
        """Run `qinit ARGUMENTS` in a directory, its output into `log`; return its exit code, minus the signal's number
        where that ended it, and the seconds that it took."""
        return self._ask(_timed, str(log), list(map(str, arguments)), kill_after, str(directory))

    def together(
        self, log: Path, count: int, *arguments: Any, kill: dict[str, Any] | None = None, **differently: dict[str, str]
    ) -> list[int]:
        """Run `qinit ARGUMENTS` in `count` processes of one run; return their exit codes, by rank.

        Each has a log of its own, `log` with its rank behind, and its rank in the place of {rank} in the arguments.
        `kill` says which `rank` is killed once the run's `journal` has `layers` layers. `differently` has what is other
        for some, by `rank0`, `rank1` and so on: `THREADS`, the `DIRECTORY` that they run in.
        """
        return self._ask(_together, count, str(log), list(map(str, arguments)), kill, differently)


def _serve(pipe: Connection) -> None:
    import numba

    from qinit.planner import operations

    numba.config.THREADING_LAYER, numba.config.NUMBA_NUM_THREADS = "workqueue", 1  # GNU OpenMP survives no fork
    operations.timed = lambda action, device: 1.0  # what is said of the time takes more than these runs
    operations.MOST_SECONDS = 0.0
    os.fsync = lambda descriptor: None  # as in the tests' own process: a killed process loses nothing
    faulthandler.enable(2)  # whatever that is in a child: where one hangs, `_end` has it say so
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has put others here
    while True:
        try:
            do, arguments = pipe.recv()
        except EOFError:
            return
        try:
            _send(pipe, do(*arguments))
        except TimeoutError as error:
            _send(pipe, error)


def _send(pipe: Connection, value: Any) -> None:
    """Send a value whole: torch would leave tensors in memory that only the sender, which may end first, can share."""
    pipe.send_bytes(pickle.dumps(value))


def run_command(arguments: list[str]) -> int:
    """Run `qinit ARGUMENTS` in this process; return its exit code."""
    from qinit_cli import main

    sys.argv = ["qinit", *arguments]
    try:
        main.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _called(do: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if not child:
        _send(theirs, do(*arguments))
        os._exit(0)
    theirs.close()
    if not ours.poll(LONGEST):
        _end({child: os.devnull})
    result = ours.recv()
    os.waitpid(child, 0)
    return result


def _end(children: dict[int, str]) -> NoReturn:
    """End processes that hang, by the log in which each says where it was."""
    for child in children:
        os.kill(child, signal.SIGABRT)
        os.waitpid(child, 0)
    stacks = "\n".join(Path(log).read_text(errors="replace")[-3000:] for log in children.values())
    raise TimeoutError(f"no end after {LONGEST:.0f} seconds:\n{stacks}")


def _child(log: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Fork a process that runs `qinit ARGUMENTS`; return its id."""
    import torch

    child = os.fork()
    if not child:
        os.environ.update(environment)
        os.chdir(environment.get("DIRECTORY", "."))
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        torch.set_num_threads(int(environment.get("THREADS", 1)))  # makes the pool anew before any thread needs it
        code = run_command(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def _together(
    count: int, log: str, arguments: list[str], kill: dict[str, Any] | None, differently: dict[str, dict[str, str]]
) -> list[int]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), count)
    shared = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = {}
    for rank in range(count):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank, **differently.get(f"rank{rank}", {})}
        words = {name: str(value) for name, value in environment.items()}
        line = [argument.replace("{rank}", str(rank)) for argument in arguments]
        children[_child(f"{log}{rank}", line, words)] = rank
    codes = [0] * count
    started = time.perf_counter()
    while children:
        if time.perf_counter() - started > LONGEST:
            _end({child: f"{log}{rank}" for child, rank in children.items()})
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            codes[children.pop(ended)] = os.waitstatus_to_exitcode(status)
        if kill and Path(kill["journal"]).exists():
            lines = Path(kill["journal"]).read_bytes()
            if lines.count(b'"kind": "layer"') >= kill["layers"]:
                os.kill(next(child for child, rank in children.items() if rank == kill["rank"]), signal.SIGKILL)
                kill = None
        time.sleep(0.002)
    return codes


def _timed(log: str, arguments: list[str], kill_after: float | None, directory: str) -> tuple[int, float]:
    started = time.perf_counter()
    child = _child(log, arguments, {"DIRECTORY": directory})
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        passed = time.perf_counter() - started
        if ended:
            return os.waitstatus_to_exitcode(status), passed
        if kill_after is not None and passed >= kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        if passed >= LONGEST:
            _end({child: log})
        time.sleep(0.002)
