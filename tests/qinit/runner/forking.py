"""Runs the real command line in processes that can be killed, without importing torch anew for each.

As a program it reads lines of JSON: the arguments, a log file, and when to kill with which signal. For each it forks,
runs `qinit ARGUMENTS` in the child, and prints how that ended and after how long.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Forks:
    """A process that forks at once what `run` asks for; use it as a context. `warm_up` are the arguments of a run that
    loads everything before the first fork."""

    def __init__(self, *warm_up: Any) -> None:
        self.warm_up = list(map(str, warm_up))

    def __enter__(self) -> Forks:
        # More threads, and GNU OpenMP, would not survive the fork.
        one = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *self.warm_up],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **one},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def run(
        self, log: Path, *arguments: Any, kill_after: float | None = None, by: int = signal.SIGKILL
    ) -> tuple[int, float]:
        """Run `qinit ARGUMENTS`; return its exit code, minus the signal's number where that ended it, and the seconds
        that it took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"log": str(log), "arguments": list(map(str, arguments)), "kill_after": kill_after, "by": int(by)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code, seconds = json.loads(self.process.stdout.readline())
        return code, seconds


def _run(arguments: list[str]) -> int:
    from qinit_cli import main

    sys.argv = ["qinit", *arguments]
    try:
        main.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _forked(job: dict[str, Any]) -> tuple[int, float]:
    import torch

    started = time.perf_counter()
    child = os.fork()
    if not child:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)  # makes the pool anew before any thread needs it
        code = _run(job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    deadline = job["kill_after"]
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        passed = time.perf_counter() - started
        if ended:
            return os.waitstatus_to_exitcode(status), passed
        if deadline is not None and passed >= deadline:
            os.kill(child, job["by"])
            deadline = None
        time.sleep(0.0005)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if sys.argv[1:]:
        _run(sys.argv[1:])
        from qinit.planner import operations

        operations.timed = lambda action, device: 1.0  # what is said of the time takes more than these runs
        operations.MOST_SECONDS = 0.0
    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), file=answers, flush=True)
