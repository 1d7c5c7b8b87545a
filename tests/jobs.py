"""Jobs of the runner at work beside an output, so that a part of a run can be carried out by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.report.report import LayerRow
from qinit.runner.job import Job
from qinit.runner.layer import read_weight, solve_layer
from qinit.workplace.place import working
from qinit.workplace.resume import opened
from tests.broken_off import Crash
from tests.helpers import exhausted

CPU = torch.device("cpu")


@contextmanager
def job_at(plan: Plan, out: Path) -> Iterator[Job]:
    """Give the job of a run, new or gone on with. An error inside breaks the run off, else nothing of it is kept."""
    with working(plan, out, "a test") as place:
        (plan, journal), _ = exhausted(opened(plan, place, CPU, overwrite=False))
        with closing(journal):
            yield Job(plan, CPU, place, journal, None)


@contextmanager
def crashing(plan: Plan, out: Path) -> Iterator[Job]:
    """Give the job of a run that crashes at the end of the block."""
    try:
        with job_at(plan, out) as job:
            yield job
            raise Crash
    except Crash:
        pass


def solved(plan: Plan, layer: LayerPlan) -> tuple[dict[str, torch.Tensor], LayerRow]:
    """Solve a layer without data, or keep it."""
    return solve_layer(plan, layer, None if layer.kept else read_weight(layer, CPU), None)
