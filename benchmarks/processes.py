"""How much faster a run is by several processes: wall clock and each process's own CPU time, by 1 and by N.

    python benchmarks/processes.py MODEL [--processes 2] [--repeats 3] [--calibration random] [--json FILE]

Each process has one thread. Every repeat makes each run once, by 1 process and by N in turn; the quickest counts, as
other work on the machine only slows down. Where the machine is shared look at the CPU time: a process that waits takes
none, so the most that any process took is what the run would take on cores of its own, reading apart. The exit code is
1 if the bytes differ. A model without a tokenizer is calibrated on random tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLES = ["--calibration-samples", "32", "--calibration-length", "256"]
RUNS = ("data-free", "calibrated")


def timed(arguments: list[str], count: int) -> dict[str, Any]:
    """Run `qinit eqft ARGUMENTS` by `count` processes; return the seconds of the wall clock and the CPU seconds of
    each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, children = time.perf_counter(), []
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        line = [sys.executable, "-m", "qinit", "eqft", *arguments]
        children.append(os.posix_spawn(sys.executable, line, environment))
    seconds = []
    for child in children:
        _, status, usage = os.wait4(child, 0)
        if status:
            sys.exit(f"a process ended with {os.waitstatus_to_exitcode(status)}")
        seconds.append(round(usage.ru_utime + usage.ru_stime, 1))
    return {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": seconds}


def sums(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every safetensors file of a run."""
    files = sorted(directory.rglob("*.safetensors"))
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--calibration", default="text", choices=("text", "random"), help="what `calibrated` reads")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    same = True
    with tempfile.TemporaryDirectory() as directory:
        for name in options.runs:
            text = ["none"] if name == "data-free" else [options.calibration, *SAMPLES]
            best: dict[int, dict[str, Any]] = {}
            kept: dict[str, str] = {}
            for _ in range(options.repeats):
                for count in (1, options.processes):
                    out = Path(directory) / "out"
                    arguments = [options.model, "--calibration", *text, "--no-check", "--quiet", "--device", "cpu"]
                    took = timed([*arguments, "--out", str(out)], count)
                    kept = kept or sums(out)
                    same &= sums(out) == kept
                    shutil.rmtree(out)
                    best[count] = min(best.get(count, took), took, key=lambda one: one["seconds"])
            alone, together = best[1], best[options.processes]
            speed_up = {
                "wall": round(alone["seconds"] / together["seconds"], 2),
                "cpu": round(max(alone["cpu_seconds"]) / max(together["cpu_seconds"]), 2),
            }
            found[name] = {"1": alone, str(options.processes): together, "speed_up": speed_up}
            print(f"{name}: {alone} -> {together}, {speed_up}", flush=True)
    print("the bytes are the same" if same else "the bytes differ")
    if options.json:
        from qinit.machine import ran_on, versions

        words = {"command": " ".join(sys.argv), "ran_on": ran_on(), "versions": versions(), "same_bytes": same}
        options.json.write_text(json.dumps({**words, "runs": found}, indent=2) + "\n")
    sys.exit(not same)


if __name__ == "__main__":
    main()
