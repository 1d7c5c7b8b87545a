"""All cells of the matrix: `make test-families`.

    python -m tests.families [--families NAME,...] [--jobs N] [--json FILE]

Prints a line for each family and head; the exit code is 1 if a cell is wrong. `--json` keeps all cells, for
docs/families.md (`make results-table`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.families.cells import Cell

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
COMMAND = "make test-families"


def main() -> None:
    from qinit.machine import ran_on, versions
    from tests.families.table import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    families = [FAMILIES[name] for name in given.families.split(",")]
    tasks = [(family.name, head) for family in families for head in family.heads if family.class_of(head)]
    cells = []
    for (name, head), (found, seconds) in zip(tasks, _tried(tasks, given.jobs), strict=True):
        cells += [cell.to_json() for cell in found]
        states = ", ".join(f"{cell.format} {cell.calibration} {cell.state}" for cell in found)
        print(f"{name}, {head}: {states} ({seconds:.0f} s)", flush=True)
        for cell in found:
            if cell.state == "wrong":
                print(f"    {cell.format} {cell.calibration}: {'; '.join(cell.found)[:400]}", flush=True)
    if given.json is not None:
        part = "" if given.families == parser.get_default("families") else given.families
        command = f"python -m tests.families --families {shlex.quote(part)}" if part else COMMAND
        result = {"kind": "families", "command": command, "versions": versions(), "machine": ran_on(), "seeds": [0]}
        given.json.write_text(json.dumps({**result, "cells": cells}, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(cell["state"] == "wrong" for cell in cells))


def _tried(tasks: list[tuple[str, str]], jobs: int) -> Iterator[tuple[list[Cell], float]]:
    """Try them in fresh processes for each few: what loaders leave behind piles up. (max_tasks_per_child can hang for
    ever, CPython gh-115634.)"""
    from tests.families.cells import try_all

    for start in range(0, len(tasks), 8 * jobs):
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            yield from pool.map(try_all, *zip(*tasks[start : start + 8 * jobs], strict=True))


if __name__ == "__main__":
    main()
