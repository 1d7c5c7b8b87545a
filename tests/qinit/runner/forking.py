"""Runs the real command line in processes that can be killed, without importing torch anew for each.

As a program it reads lines of JSON: the arguments, a log file, and when to kill with which signal. For each it forks,
runs `qinit ARGUMENTS` in the child, and prints how that ended and after how long. Or it forks several that carry out
one run together, as torchrun starts them, and prints how each ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
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

    def together(
        self, log: Path, count: int, *arguments: Any, kill: dict[str, Any] | None = None, **differently: dict[str, str]
    ) -> list[int]:
        """Run `qinit ARGUMENTS` in `count` processes of one run; return their exit codes, by rank.

        Each has a log of its own, `log` with its rank behind, and its rank in the place of {rank} in the arguments.
        `kill` says which `rank` is killed once the run's `journal` has `layers` layers. `differently` has what is other
        for some, by `rank0`, `rank1` and so on: `THREADS`, the `DIRECTORY` that they run in.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"count": count, "log": str(log), "arguments": list(map(str, arguments)), "kill": kill}
        print(json.dumps({**job, "differently": differently}), file=self.process.stdin, flush=True)
        codes: list[int] = json.loads(self.process.stdout.readline())
        return codes


def _run(arguments: list[str]) -> int:
    from qinit_cli import main

    sys.argv = ["qinit", *arguments]
    try:
        main.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


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
        code = _run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def _together(job: dict[str, Any]) -> list[int]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), job["count"])
    shared = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = {}
    for rank in range(job["count"]):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank, **job["differently"].get(f"rank{rank}", {})}
        words = {name: str(value) for name, value in environment.items()}
        line = [argument.replace("{rank}", str(rank)) for argument in job["arguments"]]
        children[_child(f"{job['log']}{rank}", line, words)] = rank
    codes, kill = [0] * job["count"], job["kill"]
    while children:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            codes[children.pop(ended)] = os.waitstatus_to_exitcode(status)
        if kill and Path(kill["journal"]).exists():
            lines = Path(kill["journal"]).read_bytes()
            if lines.count(b'"kind": "layer"') >= kill["layers"]:
                os.kill(next(child for child, rank in children.items() if rank == kill["rank"]), signal.SIGKILL)
                kill = None
        time.sleep(0.0005)
    return codes


def _forked(job: dict[str, Any]) -> tuple[int, float]:
    started = time.perf_counter()
    child = _child(job["log"], job["arguments"], {})
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
        asked = json.loads(line)
        print(json.dumps(_together(asked) if "count" in asked else _forked(asked)), file=answers, flush=True)
