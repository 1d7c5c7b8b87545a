"""Carries out a plan: reads one tensor at a time, solves, writes, and yields what happens.

Everything is written beside the target and renamed at the end, so a run that was killed or failed never looks finished.
What it had finished stays there with a journal, and the same plan goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from qinit.clock import section
from qinit.events import Done, Event, Finished, Working
from qinit.files.tensors import StoredTensor
from qinit.machine import pick_device
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.processes.group import ALONE, Processes
from qinit.report.finish import complete, copy_companions, make_report, write_configurations
from qinit.report.report import Report
from qinit.runner.calibrated import solve_calibrated
from qinit.runner.checked import check
from qinit.runner.dealt import Solved, solve_dealt, solve_without_data
from qinit.runner.job import Job
from qinit.runner.layer import read_weight, solve_layer
from qinit.runner.loadable import check_names
from qinit.runner.mixed import choose_widths
from qinit.runner.moved import in_its_coordinates
from qinit.runner.polished import polish_adapters
from qinit.runner.room import on_device_or_host, spill_note
from qinit.runner.several import followed, lead, require_alike
from qinit.source.checkpoint import count_nonfinite, require_finite
from qinit.workplace.follower import NoJournal
from qinit.workplace.place import check_output, check_space, working
from qinit.workplace.resume import moved, opened


def run(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    command: str = "",
    token: str | None = None,
    processes: Processes = ALONE,
) -> Generator[Event, None, None]:
    """Carry out a plan and put the result at `out`; yields events, the last one is Finished.

    A run that ends early, be it by an error, by `close` or by being killed, keeps its finished layers beside `out`, and
    one with the same plan goes on from there. The result is then the same, byte for byte, as that of a run that was
    never broken off, on the same processor: all of it but the times and the memory in qinit.json (`seconds`,
    `peak_memory_bytes`) and SHA256SUMS, which has the sum of that. Without a finished layer, and where the input is to
    blame, nothing is kept.

    `token` opens a private data set for calibration on the Hub; it is written nowhere. Several `processes` each make
    the plan and call this; the first one writes, and it alone yields Finished. The result is the same for any number.
    Raises OutputError (also while another run is at work on `out`, and where what is kept is that of another plan),
    CheckpointError (a damaged tensor), CalibrationError, HubError, RecipeError and ProcessesError; then nothing is at
    `out`.
    """
    device = pick_device(plan.recipe.device)
    if processes.several:
        require_alike(plan, device, processes)
    if not processes.first:
        yield from follow(plan, out, device, token, processes)
        return
    check_output(plan, out, overwrite)
    with working(plan, out, command) as place:
        check_output(plan, out, overwrite)  # another run may just have ended
        plan, journal = yield from opened(plan, place, device, overwrite=overwrite)
        with closing(journal):
            if processes.several:
                lead(plan, place, processes)
            job = Job(plan, device, place, journal, token, processes)
            yield from carried_out(job)
            report = yield from completed(job, command)
            with section("writing"):
                place.finish()
    yield Finished(report, out)


def follow(
    plan: Plan, out: Path, device: torch.device, token: str | None, processes: Processes
) -> Generator[Event, None, None]:
    """Do this process's part of a run that the first process carries out."""
    plan, place = followed(plan, out, processes)
    yield from carried_out(Job(plan, device, place, NoJournal(), token, processes))


def completed(
    job: Job, command: str, revised: Callable[[Report], Report] = lambda report: report
) -> Generator[Event, None, Report]:
    """Measure what was written and write all that stands beside the tensors; returns the report, which is written as
    it was `revised`."""
    plan, place, journal = job.plan, job.place, job.journal
    write_configurations(plan, place.run, place.out)
    with section("check"):
        yield from check_names(job)
        checked = yield from check(job)
    report = make_report(
        plan,
        tuple(job.store.rows[layer.target.name] for layer in plan.layers),
        calibration=job.calibration,
        check=checked,
        notes=tuple(job.notes),
        command=command,
        seconds=journal.seconds,
        peak_memory_bytes=journal.peak_memory_bytes,
    )
    report = revised(report)
    with section("writing"):
        complete(plan, report, place.run)
    return report


def carried_out(job: Job) -> Generator[Event, None, None]:
    """Write every tensor of base and adapter, but for what is finished already."""
    if job.processes.first and (elsewhere := moved(job.journal)) is not None:
        yield job.note(elsewhere)
    if job.plan.pending:
        yield from choose_widths(job)
        if job.processes.first:
            check_space(job.plan, job.place.out)
    if job.plan.given is None:
        if job.processes.first:
            with section("writing"):
                copy_companions(job.plan, job.place.run)
    elif not job.plan.on_source:
        with section("reading"):
            job.plan = in_its_coordinates(job.plan)
        if job.plan.moved:
            yield job.note(job.plan.moved)
    plan = job.plan
    if plan.recipe.calibrated:
        yield from solve_calibrated(job)
    store = job.store
    if job.processes.several and "gradient" not in plan.recipe.row.needs:  # these are measured by the first
        yield from solve_dealt(job)
    job.spilled = [name for names in job.processes.gather(job.spilled, "layers without room") for name in names]
    if job.processes.first:
        yield from _write_rest(job)
        if job.spilled:
            yield job.note(spill_note(job.spilled))
    if plan.recipe.polish:
        with section("polish"):
            yield from polish_adapters(job)
    if job.processes.first:
        store.close()


def _write_rest(job: Job) -> Generator[Event, None, None]:
    """Copy what is not quantized, and solve what is left."""
    plan, store = job.plan, job.store
    open_layers = any(layer.target.name not in store.rows for layer in plan.quantized)
    gradients = (yield from job.gradients()) if open_layers else {}
    for tensor, layer in store.left():
        name, row = tensor.name, None
        nbytes = tensor.nbytes if layer is None else layer.target.nbytes
        yield Working(name, nbytes)
        if layer is None:
            store.copy(name, _checked_chunks(tensor))
        elif layer.kept is not None:
            store.copy_weight(layer, _checked_chunks(tensor))
            row = store.put(layer, *on_device_or_host(job, layer.target.name, partial(_kept, job, layer)))
        else:
            row = store.put(layer, *solve_without_data(job, layer, gradients.get(layer.target.name)))
        yield Done(name, nbytes, row)
    store.copy_whole(_checked_chunks)
    store.sync()


def _kept(job: Job, layer: LayerPlan, device: torch.device) -> Solved:
    """Give a layer that stays as it is an adapter, which may depend on its weight [out, in]."""
    given = None
    if job.plan.adapter.reads_base:
        given = job.store.given(layer)
        given = read_weight(layer, device) if given is None else given.to(device)
    return solve_layer(job.plan, layer, None, None, given)


def _checked_chunks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    bad = 0
    for chunk in tensor.chunks():
        bad += count_nonfinite(chunk.view(tensor.dtype))
        yield chunk
    require_finite(tensor, bad)
