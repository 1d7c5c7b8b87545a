"""One cell of the matrix: a family, a head, a format, calibrated or not."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from qinit.errors import QinitError
from qinit.events import Finished
from qinit.formats import FORMATS
from qinit.plan.plan import Plan
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.report.report import Report
from qinit.runner.run import run
from tests.families.checker import findings
from tests.families.family import Family
from tests.families.table import FAMILIES

CALIBRATIONS = ("none", "auto")
SMALL_RUN = {"bits": 2, "rank": 4, "group_size": 32, "device": "cpu", "calibration_samples": 4}


@dataclass(frozen=True)
class Cell:
    """What came of one run: `state` is `yes`, `refused` (with the reason) or `wrong` (with what was `found`); `left`
    holds the reasons for which layers stay as they are, `calibrated` says how the text was read, or why none was."""

    family: str
    head: str
    format: str
    calibration: str
    state: str
    found: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    calibrated: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def try_cell(family: Family, head: str, fmt: str, calibration: str, directory: Path) -> Cell:
    """Run qinit on a tiny model of the family and look at what a trainer would have; the model is made in `directory`,
    if it is not there yet."""
    source = directory / "source"
    if not source.is_dir():
        family.make(head, source)
    out = directory / f"{fmt}-{calibration}"
    shutil.rmtree(out, ignore_errors=True)
    cell = family.name, head, fmt, calibration
    try:
        plan, report = _quantized(source, out, fmt, calibration)
    except QinitError as error:
        return Cell(*cell, "refused", (" ".join(str(error).replace(str(source), "the model").split()),))
    except Exception as error:  # a fault of qinit's
        return Cell(*cell, "wrong", (f"the run ends with {type(error).__name__}: {str(error)[:200]}",))
    wrong = findings(source, out, family.reads)
    left = tuple(sorted(_left(plan, report)))
    return Cell(*cell, "wrong" if wrong else "yes", tuple(wrong), left, _how(plan, report))


def try_all(name: str, head: str) -> tuple[list[Cell], float]:
    """Try every format, calibrated and not, without what the loaders print; return the seconds that it took, too."""
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        cells = [
            try_cell(FAMILIES[name], head, fmt, calibration, Path(directory))
            for fmt in ("dense", "gptq")
            for calibration in CALIBRATIONS
        ]
    return cells, time.perf_counter() - started


def _quantized(source: Path, out: Path, fmt: str, calibration: str) -> tuple[Plan, Report]:
    options = {**SMALL_RUN, "format": fmt, "calibration": calibration, "calibration_length": 16}
    plan = make_plan(make_recipe(model=str(source), check=calibration != "none", **options), source, source.name)
    *_, last = run(plan, out)
    assert isinstance(last, Finished)
    return plan, last.report


def _left(plan: Plan, report: Report) -> set[str]:
    """Return the reasons for which layers or experts stay as they are."""
    stacks = plan.architecture.stacks
    left = {each.reason for each in plan.left} | {row.kept for row in report.layers if row.kept}
    left |= {f"experts: {stack.unknown}" for stack in stacks if stack.unknown}
    if any(stack.sources for stack in stacks) and not FORMATS[plan.recipe.format].holds_experts:
        left.add(f"experts: {FORMATS[plan.recipe.format].experts_note}")
    return left


def _how(plan: Plan, report: Report) -> str:
    """Say how a run was calibrated."""
    if "calibration" not in report.totals:
        return f"none: {plan.calibration_reason}" if plan.calibration_reason else "none"
    whole = next((note for note in report.notes if "whole model in memory" in note), None)
    return "block by block" if whole is None else "the whole model at once"
