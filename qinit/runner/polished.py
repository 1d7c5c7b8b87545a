"""The polish at a run's end."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qinit.errors import CheckpointError, OutputError
from qinit.events import Event, Progress
from qinit.formats import FORMATS
from qinit.linalg.low_rank import LowRank
from qinit.plan.parts import LayerPlan
from qinit.runner.job import Job
from qinit.runner.layer import read_weight
from qinit.runner.room import in_portions
from qinit.solver.residual import relative_errors
from qinit.steps import told
from qinit.text.samples import Portion, Samples
from qinit.train.polish import Trained, polish
from qinit.train.student import Start, student_of
from qinit.train.teacher import Lessons, teach
from qinit.workplace.kept import apply_polish, save_polish
from qinit.workplace.store import Store


def polish_adapters(job: Job) -> Generator[Event, None, None]:
    """Polish all adapters and scales together and put them in the place of those that were fitted layer by layer. All
    processes of a run call it; the first writes."""
    if job.processes.from_first(lambda: job.journal.find("polish") is None, "a kept polish"):
        yield from _polish(job)
    if not job.processes.first:
        return
    result, errors = apply_polish(job.store)
    job.calibration["polish"] = result
    if not result["kept"]:
        yield job.note("polish: did not lower the held-out loss, so the adapters stay as they were")
    for name, (start, error) in errors.items():
        # What the layer's output was off by was measured before; the polish trades it between layers.
        job.store.rows[name] = replace(
            job.store.rows[name], error_start=start, error=error, output_error_start=None, output_error=None
        )


def _polish(job: Job) -> Generator[Event, None, None]:
    """Polish, measure the weight errors anew, and keep the result."""
    plan, store = job.plan, job.store
    adapted = (layer for layer in plan.quantized if layer.target.module.expert is None and layer.rank)
    layers = {layer.target.name: layer for layer in adapted}
    samples, seen = yield from job.polish_samples()
    lessons = yield from _lessons(job, samples)
    starts = {
        name: job.processes.from_first(partial(_start, store, layer), "a layer's start")
        for name, layer in layers.items()
    }
    with student_of(plan, starts, job.device, job.weight) as student:
        training = polish(
            student,
            lessons,
            samples,
            steps=plan.recipe.polish_steps,
            seed=plan.recipe.seed,
            state=job.place.partial / "polishing.safetensors",
            unseen=_unseen(samples, seen),
            processes=job.processes,
        )
        result = yield from told(training, partial(_timed, job))
    if result.note:
        yield job.note(result.note)
    if not job.processes.first:
        return
    errors: dict[str, tuple[float, float]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, trained in result.layers.items():
        changed = _encoded(job, layers[name], trained)
        errors[name] = _errors(job, layers[name], trained.low_rank, changed)
        tensors |= changed
    words = {
        "steps": result.steps,
        "text": samples.origin,
        "tokens": samples.count,
        "held_out_before": result.before,
        "held_out_after": result.after,
    }
    save_polish(store, {**words, "kept": result.kept}, errors, tensors)


def _timed(job: Job, event: Progress) -> Progress:
    """Let the journal know how long it has taken, whenever the training has kept how far it is."""
    if event.held_out is not None and job.processes.first:
        job.journal.append({"kind": "polishing", "step": event.step}, sync=False)
    return event


def _lessons(job: Job, samples: Samples) -> Generator[Event, None, Lessons]:
    """Return what the source makes of the text: what was kept of it, or made anew, by the first process, where that is
    not whole."""
    directory = job.place.partial / "lessons"
    if job.processes.first and not (job.journal.find("lessons") and _are_whole(directory, samples)):

        def make(portion: Portion) -> Generator[Event, None, Lessons]:
            return (yield from teach(job.plan, samples, job.device, directory, job.place.scratch, portion))

        yield from in_portions(job, "the lessons", make, alone=True)
        job.journal.append({"kind": "lessons"})
    job.processes.meet("the lessons")
    if not _are_whole(directory, samples):
        raise OutputError(f"{directory}: not all processes see it; choose a place with --out that all machines share")
    return Lessons(directory)


def _are_whole(directory: Path, samples: Samples) -> bool:
    try:
        return len(Lessons(directory)) == len(samples.tokens)
    except CheckpointError:
        return False


def _unseen(samples: Samples, seen: Samples) -> frozenset[int]:
    """Return the numbers of the samples that are not among those `seen`."""
    known = {tuple(row) for row in seen.tokens.tolist()}
    return frozenset(number for number, row in enumerate(samples.tokens.tolist()) if tuple(row) not in known)


def _start(store: Store, layer: LayerPlan) -> Start:
    codes = store.codes(layer)
    if codes is not None:
        return Start(codes, store.low_rank(layer))
    return Start(
        store.quantized(layer).to(FORMATS[store.plan.recipe.format].storage(layer.target)), store.low_rank(layer)
    )


def _encoded(job: Job, layer: LayerPlan, trained: Trained) -> dict[str, torch.Tensor]:
    """Return the tensors that change: the factors, and the scales where they were trained."""
    recipe = job.plan.recipe
    changed = job.plan.adapter.encode(layer.target.module, trained.low_rank, layer.rank, recipe.lora_scale, 0)
    if trained.scales is not None:
        changed |= FORMATS[recipe.format].scales(layer.target, trained.scales)
    return changed


def _errors(job: Job, layer: LayerPlan, low_rank: LowRank, changed: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the errors of Q alone and of Q + L, relative to the weight."""
    quantized = job.store.quantized(layer, changed, job.device)
    return relative_errors(read_weight(layer, job.device), quantized, low_rank.to(job.device))
