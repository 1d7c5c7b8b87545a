"""The layers that calibration text reaches, solved as what they see becomes known."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial

from qinit.calibration.walk import OpenBlock, Seen, Walk
from qinit.calibration.whole import WholeModel
from qinit.errors import CalibrationError
from qinit.events import Done, Event, Noted, Working
from qinit.linalg.low_rank import OutputMetric
from qinit.plan.plan import few_tokens
from qinit.runner.given import read_given
from qinit.runner.job import Job
from qinit.runner.layer import solve_layer
from qinit.runner.staged import Held
from qinit.stream.calls import NotStreamable
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
    if not recipe.row.walks:
        return
    if samples.count < recipe.calibration_samples * plan.facts.clip(recipe.calibration_length):  # else the plan says it
        for note in few_tokens(plan, samples.count, "give more text"):
            yield job.note(note)
    if all(layer.target.name in job.store.rows for layer in plan.quantized):
        return
    metrics = yield from job.output_metrics()
    with closing(_blocks(job, samples)) as blocks:
        for block in blocks:
            if isinstance(block, Noted):
                yield block
            else:
                yield from _solve_block(job, block, metrics)
    for note in _expert_notes(job):
        yield job.note(note)
    for layer in plan.quantized:
        if layer.target.name not in job.store.rows:
            yield job.note(f"{layer.target.name}: lies outside of the model's blocks, so solved without data")


def _expert_notes(job: Job) -> Iterator[str]:
    """Say how many experts saw no token, or few."""
    seen: dict[tuple[str, int], tuple[int, int]] = {}  # the fewest tokens of an expert's matrices, and its inputs
    for layer in job.plan.quantized:
        expert, row = layer.target.module.expert, job.store.rows.get(layer.target.name)
        if expert is not None and row is not None:
            key = layer.target.module.parameter.rpartition(".")[0], expert.index
            seen[key] = min(seen.get(key, (2**60, 0)), (row.tokens or 0, layer.target.module.in_features))
    none = sum(not tokens for tokens, _ in seen.values())
    few = sum(0 < tokens < inputs for tokens, inputs in seen.values())
    if none:
        yield f"{none} of {len(seen)} experts saw no token of the calibration text, so solved without data"
    if few:
        yield (
            f"{few} of {len(seen)} experts saw fewer tokens than they have inputs, so what all experts of their layer "
            "read counts for most of what they are fitted to"
        )


def _solve_block(
    job: Job, block: OpenBlock | WholeModel, metrics: dict[str, OutputMetric]
) -> Generator[Event, None, None]:
    """Solve a block's layers, one after the other, each written at once; or, where the method has stages, all of them
    when these have had their say."""
    plan, store = job.plan, job.store
    held = Held(plan) if plan.recipe.row.stages else None
    for event in block.visit():
        if not isinstance(event, Seen):
            yield event
            continue
        layer, statistics = event.layer, event.statistics
        tensor = layer.target.tensor
        yield Working(tensor.name, layer.target.nbytes)
        if statistics is None and layer.target.module.expert is None:
            yield job.note(f"{layer.target.name}: never reached by the calibration text, so solved without data")
        if statistics is not None:
            statistics = replace(statistics, output_metric=metrics.get(layer.target.name))
        given = read_given(store, layer, event.weight)
        tensors, row = solve_layer(plan, layer, event.weight, statistics, given)
        if held is None:
            store.put(layer, tensors, row)
            weight = store.weight(layer, job.device)
        else:
            weight = held.add(layer, event.weight, tensors, row).to(job.device)
        if event.repair is not None:
            event.repair(layer, weight)
        if held is None:
            yield Done(tensor.name, layer.target.nbytes, row)
    if held is not None:
        assert isinstance(block, OpenBlock)
        for layer, tensors, row in held.improved(block):
            store.put(layer, tensors, row)
            yield Done(layer.target.tensor.name, layer.target.nbytes, row)


def _blocks(job: Job, samples: Samples) -> Generator[OpenBlock | WholeModel | Noted, None, None]:
    """Walk block by block, or take the whole model where that is not possible."""
    plan, store, row = job.plan, job.store, job.plan.recipe.row
    reason = "the method needs all gradients at once"
    if "fisher" not in row.needs:
        under_way = False
        try:
            walk = Walk(
                plan,
                samples,
                job.device,
                plan.recipe.calibration_mode,
                scratch=job.place.scratch,
                finished=store.rows,
                weight_of=partial(store.weight, device=job.device),
                whole_blocks=bool(row.stages),
            )
            with closing(iter(walk)) as blocks:
                for block in blocks:
                    under_way = True
                    yield block
            return
        except NotStreamable as error:
            reason = str(error)
            if under_way:
                raise CalibrationError(
                    f"{plan.checkpoint.directory}: {reason}; use --calibration none or --calibration-mode parallel"
                ) from None
            yield job.note(f"calibration with the whole model in memory: {reason}")
    if row.stages:
        raise CalibrationError(
            f"{plan.checkpoint.directory}: method {row.name} works block by block ({', '.join(row.stages)}), and this "
            f"model does not run so: {reason}"
        )
    yield WholeModel(plan, samples, job.device, store.rows)
