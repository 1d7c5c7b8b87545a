"""The widths of a mixed run, chosen before its layers are solved."""

from __future__ import annotations

from collections.abc import Generator

from qinit.clock import section
from qinit.events import Allotted, Event
from qinit.plan.allocation import Sensitivity
from qinit.runner.job import Job
from qinit.widths import fisher
from qinit.widths.budget import allotted, options
from qinit.widths.validity import check_sensitivity


def choose_widths(job: Job) -> Generator[Event, None, None]:
    """Measure how sensitive each layer is and choose the widths. Of several processes the first solves and measures
    all layers at all widths, and tells the others."""
    choices, first = options(job.plan), job.processes.first
    record = job.processes.from_first(lambda: job.journal.find("sensitivity"), "kept sensitivities")
    if record is None:
        samples = yield from job.samples()
        metrics = yield from job.output_metrics()
        measured: Sensitivity | None = None
        if first:
            with section("sensitivity"):
                measured = yield from fisher.measure(job.plan, choices, samples, job.device, job.place.scratch, metrics)
            job.journal.append({"kind": "sensitivity", "measured": measured.to_json()})
        measured = job.processes.from_first(lambda: measured, "sensitivities")
        assert measured is not None
    else:
        measured = Sensitivity.from_json(record["measured"])
        check_sensitivity(measured, job.plan, choices, job.place.journal)
    job.plan = allotted(job.plan, measured)
    yield Allotted(job.plan)
