"""The layers that calibration text reaches, solved as what they see becomes known."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial

from qinit.calibration.walk import Seen, Walk
from qinit.calibration.whole import whole_model
from qinit.errors import CalibrationError
from qinit.events import (
    Done,
    Event,
    Measuring,
    Noted,
    Passing,
    Working,
)
from qinit.runner.job import Job
from qinit.runner.layer import solve_layer
from qinit.stream.blocks import NotStreamable
from qinit.text.samples import Samples


def solve_calibrated(job: Job) -> Generator[Event, None, None]:
    """Solve every layer that the calibration text reaches, as what it sees becomes known."""
    plan, recipe = job.plan, job.plan.recipe
    samples = yield from job.samples()
    if recipe.polish and len(samples.tokens) < 2:  # it would say so itself, after everything else
        raise CalibrationError(
            "polish: needs at least 2 samples, one to learn from and one to check on, found "
            f"{len(samples.tokens)} ({samples.origin}); give more or longer text"
        )
    job.calibration = {"text": samples.origin, "tokens": samples.count}
    widest = max(layer.target.module.in_features for layer in plan.quantized)
    if samples.count < widest:
        yield job.note(
            f"calibration: {samples.count} tokens are fewer than the {widest} inputs of the widest layer, so H is "
            f"singular and damped more; {8 * widest} or more are better"
        )
    if all(layer.target.name in job.store.rows for layer in plan.quantized):
        return
    metrics = yield from job.output_metrics()
    for event in _walk(job, samples):
        if not isinstance(event, Seen):
            yield event
            continue
        layer, statistics = event.layer, event.statistics
        if layer.target.name in job.store.rows:
            continue
        yield Working(layer.target.tensor.name, layer.target.tensor.nbytes)
        if statistics is None:
            yield job.note(f"{layer.target.name}: never reached by the calibration text, so solved without data")
        else:
            statistics = replace(statistics, output_metric=metrics.get(layer.target.name))
        row = job.store.put(layer, *solve_layer(plan, layer, event.weight, statistics))
        if event.repair is not None:
            event.repair(layer, job.store.weight(layer, job.device))
        yield Done(layer.target.tensor.name, layer.target.tensor.nbytes, row)
    for layer in plan.quantized:
        if layer.target.name not in job.store.rows:
            yield job.note(f"{layer.target.name}: lies outside of the model's blocks, so solved without data")


def _walk(job: Job, samples: Samples) -> Iterator[Measuring | Passing | Noted | Seen]:
    """Walk block by block, or take the whole model where that is not possible."""
    plan, store = job.plan, job.store
    if "fisher" not in plan.recipe.row.needs:
        under_way = False
        try:
            for event in Walk(
                plan,
                samples,
                job.device,
                plan.recipe.calibration_mode,
                scratch=job.place.scratch,
                finished=store.rows,
                weight_of=partial(store.weight, device=job.device),
            ):
                under_way |= not isinstance(event, Measuring)
                yield event
            return
        except NotStreamable as reason:
            if under_way:
                raise CalibrationError(
                    f"{plan.checkpoint.directory}: {reason}; use --calibration none or --calibration-mode parallel"
                ) from None
            yield job.note(f"calibration with the whole model in memory: {reason}")
    yield from whole_model(plan, samples, job.device)
