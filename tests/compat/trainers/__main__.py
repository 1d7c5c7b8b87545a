"""Runs the trainers of the table, or those that are named, and prints a line for each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.compat.trainers.attempt import Attempt, make_runs
from tests.compat.trainers.environment import environment
from tests.compat.trainers.merged import check_merge
from tests.compat.trainers.table import ROWS, Row

LIMIT = 900  # seconds for one call of a trainer
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
# gptqmodel would compile each layer's dequantize, which takes a minute of compiler; Axolotl reports its use.
QUIET |= {"TORCHDYNAMO_DISABLE": "1", "WANDB_MODE": "disabled", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}


def launcher(programs: Path):
    """Return what runs a command with these programs, and raises AssertionError with its last words."""
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    foreign = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    variables = {key: value for key, value in os.environ.items() if key not in foreign} | QUIET | {"PATH": path}

    def launch(command: list[str], place: Path) -> None:
        program = [str(programs / command[0]), *command[1:]]
        kinds = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(program, cwd=place, env=variables, text=True, timeout=LIMIT, check=False, **kinds)
        if done.returncode:
            tail = "\n".join(done.stdout.splitlines()[-30:])
            raise AssertionError(f"{command[0]} ended with {done.returncode}:\n{tail}")

    return launch


def attempts(row: Row, place: Path):
    """Yield what each attempt of a row is called, and the attempt."""
    launch = launcher(environment(row))
    runs = make_runs(place / row.name, row.formats)
    for fmt, run in runs.items():
        for stage in row.stages if fmt == "dense" else row.stages[:1]:
            changes = dict(row.changes)
            changes |= {"stage": stage, "dataset": "plain" if stage == "pt" else "train"} if stage else {}
            words = " ".join(filter(None, (row.name, fmt, stage)))
            yield words, Attempt(row.trainer, run, place / words.replace(" ", "-"), launch, changes)


def main(names: list[str]) -> None:
    unknown = set(names) - ROWS.keys()
    if unknown:
        sys.exit(f"error: no trainer {', '.join(sorted(unknown))}; known are {', '.join(ROWS)}")
    passed = failed = 0
    for name in names or ROWS:
        with TemporaryDirectory(prefix="qinit-trainers-") as place:
            try:
                for words, attempt in attempts(ROWS[name], Path(place)):
                    started = time.monotonic()
                    try:
                        seen = attempt.check() + check_merge(attempt)
                    except (AssertionError, subprocess.TimeoutExpired) as error:
                        failed, seen = failed + 1, f"FAILED: {error}"
                    else:
                        passed += 1
                    print(f"{words}: {seen} ({time.monotonic() - started:.0f} s)", flush=True)
            except subprocess.CalledProcessError as error:
                failed += 1
                print(f"{name}: FAILED: no environment ({' '.join(error.cmd[3:])})", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
