"""The widths of a mixed run, chosen before its layers are solved."""

from __future__ import annotations

from collections.abc import Generator

from qinit.clock import section
from qinit.events import Allotted, Event
from qinit.plan.allocation import Sensitivity
from qinit.runner.job import Job
from qinit.runner.room import in_portions, moved
from qinit.text.samples import Portion
from qinit.widths import fisher
from qinit.widths.budget import allotted, options
from qinit.widths.validity import check_sensitivity


def choose_widths(job: Job) -> Generator[Event, None, None]:
    """Measure how sensitive each layer is and choose the widths."""
    choices = options(job.plan)
    record = job.processes.from_first(lambda: job.journal.find("sensitivity"), "kept sensitivities")
    if record is None:
        samples = yield from job.samples()
        metrics = yield from job.output_metrics()

        def measure(portion: Portion) -> Generator[Event, None, Sensitivity]:
            own = job.plan, choices, samples, job.device, job.place.scratch
            return (yield from fisher.measure(*own, moved(metrics, job.device), job.processes, portion))

        with section("sensitivity"):
            measured = yield from in_portions(job, "the sensitivities", measure)
        job.journal.append({"kind": "sensitivity", "measured": measured.to_json()})
    else:
        measured = Sensitivity.from_json(record["measured"])
        check_sensitivity(measured, job.plan, choices, job.place.journal)
    job.plan = allotted(job.plan, measured)
    yield Allotted(job.plan)
