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
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
COMMAND = "make test-families"


def main() -> None:
    from qinit.machine import ran_on, versions
    from tests.families.cells import try_all
    from tests.families.table import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    families = [FAMILIES[name] for name in given.families.split(",")]
    tasks = [(family.name, head) for family in families for head in family.heads if family.class_of(head)]
    cells = []
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn"), max_tasks_per_child=8) as pool:
        for (name, head), (found, seconds) in zip(tasks, pool.map(try_all, *zip(*tasks, strict=True)), strict=True):
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


if __name__ == "__main__":
    main()
