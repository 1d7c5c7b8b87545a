"""The layers that calibration text reaches, solved as what they see becomes known."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial

import torch

from qinit.calibration.seen import Seen
from qinit.calibration.walk import OpenBlock, Walk
from qinit.calibration.whole import WholeModel
from qinit.errors import CalibrationError, ProcessesError
from qinit.events import Done, Event, Noted
from qinit.linalg.low_rank import OutputMetric
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import few_tokens
from qinit.processes.group import ALONE, Processes
from qinit.runner.dealt import Solved, solve_together
from qinit.runner.given import read_given
from qinit.runner.job import Job
from qinit.runner.layer import solve_layer
from qinit.runner.room import in_portions, moved, on_device_or_host
from qinit.runner.staged import Held
from qinit.stream.calls import NotStreamable
from qinit.text.samples import Portion, Samples


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
    yield from in_portions(job, "calibration", partial(_solve_walked, job, samples, metrics))
    for note in _expert_notes(job):
        yield job.note(note)
    for layer in plan.quantized:
        if layer.target.name not in job.store.rows:
            yield job.note(f"{layer.target.name}: lies outside of the model's blocks, so solved without data")


def _solve_walked(
    job: Job, samples: Samples, metrics: dict[str, OutputMetric], portion: Portion
) -> Generator[Event, None, None]:
    """Solve the layers that are left, as the text comes to them. Where it is called again, as a device had no room, the
    processes may have come to different layers: those of the first count."""
    if job.processes.several:
        rows = job.processes.from_first(lambda: job.store.rows, "what is finished")
        job.store.rows = dict(rows)
    with closing(_blocks(job, samples, portion)) as blocks:
        for block in blocks:
            if isinstance(block, Noted):
                yield block
            elif isinstance(block, WholeModel):
                yield from _solve_whole(job, block, metrics)
            else:
                yield from _solve_block(job, block, metrics)


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
    """Solve a block's layers, each written at once; or, where the method has stages, all of them when these have had
    their say. One process takes one after the other, several take those that are solved side by side together."""
    held = Held(job.plan) if job.plan.recipe.row.stages else None
    together: list[Seen] = []
    for event in block.visit():
        if not isinstance(event, Seen):
            yield event
        else:
            together.append(event)
            if event.last or not job.processes.several:
                yield from _solve_seen(job, together, metrics, held)
                together.clear()
        del event  # what a layer has seen is large
    if held is not None:
        assert isinstance(block, OpenBlock)
        for layer, tensors, row in held.improved(block):
            job.store.put(layer, tensors, row)
            yield Done(layer.target.tensor.name, layer.target.nbytes, row)


def _solve_seen(
    job: Job, together: list[Seen], metrics: dict[str, OutputMetric], held: Held | None
) -> Generator[Event, None, None]:
    """Solve layers that do not see each other's repair, and repair each for those that follow."""
    seen = {one.layer.target.name: one for one in together}
    solve = partial(_solved, job, metrics, seen)
    solved = yield from solve_together(job, [one.layer for one in together], solve)
    for one, (tensors, row) in zip(together, solved, strict=True):
        layer = one.layer
        if row.tokens is None and layer.target.module.expert is None:
            yield job.note(f"{row.name}: never reached by the calibration text, so solved without data")
        if held is None:
            job.store.put(layer, tensors, row)
            if one.repair is not None:
                one.repair(layer, job.weight(layer, tensors))
            yield Done(layer.target.tensor.name, layer.target.nbytes, row)
            continue
        weight = held.add(layer, one.weight, tensors, row)
        if one.repair is not None:
            one.repair(layer, weight.to(job.device))


def _solve_whole(job: Job, model: WholeModel, metrics: dict[str, OutputMetric]) -> Generator[Event, None, None]:
    """Solve the layers of a model that is taken as a whole; of several processes the first does it for all."""
    if job.processes.first:
        alone = copy.copy(job)
        alone.processes = ALONE
        yield from _solve_block(alone, model, metrics)
    job.store.rows.update(job.processes.from_first(lambda: job.store.rows, "what is finished"))


def _solved(
    job: Job, metrics: dict[str, OutputMetric], seen: dict[str, Seen], layer: LayerPlan, processes: Processes
) -> Solved:
    """Solve a layer by what it has seen; several processes share its rows."""
    one = seen[layer.target.name]
    statistics = one.statistics
    if statistics is not None:
        statistics = replace(statistics, output_metric=metrics.get(layer.target.name))

    def solve(device: torch.device) -> Solved:
        weight = one.weight.to(device)
        given = read_given(job.store, layer, weight)
        return solve_layer(job.plan, layer, weight, moved(statistics, device), given, processes=processes)

    return on_device_or_host(job, layer.target.name, solve)


def _blocks(job: Job, samples: Samples, portion: Portion) -> Generator[OpenBlock | WholeModel | Noted, None, None]:
    """Walk block by block, or take the whole model where that is not possible; that is done by the first process."""
    plan, store, row, processes = job.plan, job.store, job.plan.recipe.row, job.processes
    if row.stages and processes.several:
        raise ProcessesError(f"method {row.name} works block by block in one process; start it without torchrun")
    reason: str | None = "the method needs all gradients at once"
    if "fisher" not in row.needs:
        with closing(_walked(job, samples, portion)) as blocks:
            reason = yield from blocks
        if reason is None:
            return
        yield job.note(f"calibration with the whole model in memory: {reason}")
    if row.stages:
        raise CalibrationError(
            f"{plan.checkpoint.directory}: method {row.name} works block by block ({', '.join(row.stages)}), and this "
            f"model does not run so: {reason}"
        )
    yield WholeModel(plan, samples, job.device, store.rows, portion)


def _walked(job: Job, samples: Samples, portion: Portion) -> Generator[OpenBlock, None, str | None]:
    """Walk block by block; returns, where no process has a block yet, why that is not possible."""
    plan, store = job.plan, job.store
    reason, blocks, block = None, None, None
    try:
        walk = Walk(
            plan,
            samples,
            job.device,
            plan.recipe.calibration_mode,
            scratch=job.place.scratch,
            finished=store.rows,
            weight_of=job.weight,
            whole_blocks=bool(plan.recipe.row.stages),
            processes=job.processes,
            portion=portion,
        )
        blocks = iter(walk)
        block = next(blocks, None)
    except NotStreamable as error:
        reason = str(error)
    found = [why for why in job.processes.gather(reason, "a model in blocks") if why]
    if found or blocks is None:
        return found[0]
    with closing(blocks):
        try:
            while block is not None:
                yield block
                block = next(blocks, None)
        except NotStreamable as error:
            raise CalibrationError(
                f"{plan.checkpoint.directory}: {error}; use --calibration none or --calibration-mode parallel"
            ) from None
    return None
