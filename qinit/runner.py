"""Carries out a plan: reads one tensor at a time, solves, writes, and yields what happens.

Everything is written beside the target and renamed at the end, so a run that was killed or failed never looks finished.
What it had finished stays there with a journal, and the same plan goes on from it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from qinit.adapters import lora as adapter
from qinit.calibration.output_metric import output_metrics
from qinit.calibration.walk import Seen, Walk
from qinit.calibration.whole import whole_model
from qinit.errors import CalibrationError
from qinit.events import (
    Allotted,
    Discarded,
    Done,
    Event,
    Finished,
    Measuring,
    Noted,
    Passing,
    Progress,
    Resumed,
    Sampling,
    Working,
)
from qinit.files.tensors import StoredTensor
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.journal import Journal
from qinit.linalg.low_rank import LowRank, OutputMetric
from qinit.machine import pick_device
from qinit.output import Workplace, check_output, check_space, working
from qinit.plan.allocation import Sensitivity
from qinit.plan.plan import LayerPlan, Plan
from qinit.report.finish import complete, copy_companions, make_report
from qinit.report.report import LayerRow
from qinit.resume import moved, opened
from qinit.solver.residual import residual_norm
from qinit.solver.solve import solve
from qinit.solver.spec import seed_of
from qinit.solver.statistics import Statistics
from qinit.source.checkpoint import count_nonfinite, not_decomposable, require_finite
from qinit.store import Store, apply_polish, load_samples, save_polish, save_samples
from qinit.stream.blocks import NotStreamable
from qinit.text.for_run import text_for
from qinit.text.samples import Samples
from qinit.train.polish import Polished, polish
from qinit.widths import fisher
from qinit.widths.budget import allotted, options
from qinit.widths.validity import check_sensitivity

__all__ = [
    "Allotted",
    "Discarded",
    "Done",
    "Event",
    "Finished",
    "Measuring",
    "Noted",
    "Passing",
    "Progress",
    "Resumed",
    "Sampling",
    "Working",
    "run",
]


def run(
    plan: Plan, out: Path, *, overwrite: bool = False, command: str = "", token: str | None = None
) -> Generator[Event, None, None]:
    """Carry out a plan and put the result at `out`; yields events, the last one is Finished.

    A run that ends early, be it by an error, by `close` or by being killed, keeps its finished layers beside `out`, and
    one with the same plan goes on from there. The result is then the same, byte for byte, as that of a run that was
    never broken off, on the same processor: all of it but the times and the memory in qinit.json (`seconds`,
    `peak_memory_bytes`) and SHA256SUMS, which has the sum of that. Without a finished layer, and where the input is to
    blame, nothing is kept.

    `token` opens a private data set for calibration on the Hub; it is written nowhere.
    Raises OutputError (also while another run is at work on `out`, and where what is kept is that of another plan),
    CheckpointError (a damaged tensor), CalibrationError, HubError and RecipeError; then nothing is at `out`.
    """
    check_output(plan, out, overwrite)
    device = pick_device(plan.recipe.device)
    with working(plan, out, command) as place:
        check_output(plan, out, overwrite)  # another run may just have ended
        plan, journal = yield from opened(plan, place, device, overwrite=overwrite)
        with closing(journal):
            job = _Job(plan, device, place, journal, token)
            yield from _carried_out(job)
            report = make_report(
                job.plan,
                tuple(job.store.rows[layer.target.name] for layer in plan.layers),
                calibration=job.calibration,
                notes=tuple(job.notes),
                command=command,
                seconds=journal.seconds,
                peak_memory_bytes=journal.peak_memory_bytes,
            )
            complete(job.plan, report, place.run, out)
            place.finish()
    yield Finished(report, out)


@dataclass
class _Job:
    """A run under way: where it writes to, and what is known so far."""

    plan: Plan
    device: torch.device
    place: Workplace
    journal: Journal
    token: str | None
    samples: Samples | None = None
    outputs: dict[str, OutputMetric] | None = None
    calibration: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def store(self) -> Store:
        """Only once the widths are known: they decide the layout."""
        return Store(self.plan, self.place, self.journal)

    @property
    def notes(self) -> list[str]:
        return [record["text"] for record in self.journal.records if record["kind"] == "note"]

    def note(self, text: str) -> Noted:
        if text not in self.notes:
            self.journal.append({"kind": "note", "text": text}, sync=False)
        return Noted(text)


def _carried_out(job: _Job) -> Generator[Event, None, None]:
    """Write every tensor of base and adapter, but for what is finished already."""
    if (elsewhere := moved(job.journal)) is not None:
        yield job.note(elsewhere)
    if job.plan.pending:
        yield from _allotted(job)
        check_space(job.plan, job.place.out)
    plan, store = job.plan, job.store
    copy_companions(plan, job.place.run)
    if plan.recipe.calibrated:
        yield from _calibrated(job)
    by_tensor = {layer.target.tensor.name: layer for layer in plan.layers}
    for name, tensor in plan.checkpoint.tensors.items():
        layer = by_tensor.get(name)
        if name in store.copied or (layer is not None and layer.target.name in store.rows):
            continue
        yield Working(name, tensor.nbytes)
        row = None
        if layer is None:
            store.copy(name, _checked_chunks(tensor))
        else:
            row = _solve_alone(job, layer)
        yield Done(name, tensor.nbytes, row)
    store.sync()
    if plan.recipe.polish:
        yield from _polished(job)
    store.close()


def _allotted(job: _Job) -> Generator[Event, None, None]:
    """Measure how sensitive each layer is and choose the widths."""
    choices = options(job.plan)
    record = job.journal.find("sensitivity")
    if record is None:
        samples = yield from _text(job)
        metrics = yield from _output_metrics(job, samples)
        measured = yield from fisher.measure(job.plan, choices, samples, job.device, job.place.scratch, metrics)
        job.journal.append({"kind": "sensitivity", "measured": measured.to_json()})
    else:
        measured = Sensitivity.from_json(record["measured"])
        check_sensitivity(measured, job.plan, choices, job.place.journal)
    job.plan = allotted(job.plan, measured)
    yield Allotted(job.plan)


def _text(job: _Job) -> Generator[Event, None, Samples]:
    """Return the text that the model is run on: what was kept of it, or read or written anew and then kept."""
    if job.samples is None:
        job.samples = load_samples(job.place, job.journal)
    if job.samples is None:
        source = job.plan.recipe.calibration if job.plan.recipe.calibrated else "self"
        yield Sampling(source)
        job.samples = text_for(job.plan, job.device, job.token)
        save_samples(job.place, job.journal, job.samples, written=job.plan.recipe.calibration == "self")
    return job.samples


def _calibrated(job: _Job) -> Generator[Event, None, None]:
    """Solve every layer that the calibration text reaches, as what it sees becomes known."""
    plan, recipe = job.plan, job.plan.recipe
    samples = yield from _text(job)
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
    metrics = yield from _output_metrics(job, samples)
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
            statistics = replace(statistics, outputs=metrics.get(layer.target.name))
        row = _solve_layer(job, layer, event.weight, statistics)
        if event.repair is not None:
            event.repair(layer, job.store.weight(layer, job.device))
        yield Done(layer.target.tensor.name, layer.target.tensor.nbytes, row)
    for layer in plan.quantized:
        if layer.target.name not in job.store.rows:
            yield job.note(f"{layer.target.name}: lies outside of the model's blocks, so solved without data")


def _output_metrics(job: _Job, samples: Samples) -> Generator[Event, None, dict[str, OutputMetric]]:
    """Measure, once, what errors at the layers' outputs cost, if the method asks for it."""
    if job.outputs is None:
        job.outputs = {}
        if job.plan.recipe.row.metric == "kfac":
            job.outputs = yield from output_metrics(job.plan, samples, job.device, job.place.scratch)
    return job.outputs


def _walk(job: _Job, samples: Samples) -> Iterator[Measuring | Passing | Noted | Seen]:
    """Walk block by block, or take the whole model where that is not possible."""
    plan, store = job.plan, job.store
    if plan.recipe.row.metric != "fisher":
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


def _solve_alone(job: _Job, layer: LayerPlan) -> LayerRow:
    """Read and solve one layer without data; a kept layer is copied and only gets a fresh adapter."""
    if layer.kept is None:
        return _solve_layer(job, layer, _read_weight(layer, job.device), None)
    job.store.base.write_chunks(layer.target.tensor.name, _checked_chunks(layer.target.tensor))
    return _solve_layer(job, layer, None, None)


def _read_weight(layer: LayerPlan, device: torch.device) -> torch.Tensor:
    target = layer.target
    raw = target.tensor.read()
    require_finite(target.tensor, count_nonfinite(raw))
    return (raw.T if target.module.transposed else raw).to(device, torch.float32).contiguous()


def _solve_layer(job: _Job, layer: LayerPlan, weight: torch.Tensor | None, statistics: Statistics | None) -> LayerRow:
    """Solve one layer and write both of its parts."""
    started = time.perf_counter()
    target, recipe = layer.target, job.plan.recipe
    seed = seed_of(target.name, recipe.seed)
    solution, tensors = None, {}
    if weight is not None:
        without_data = recipe.calibrated and statistics is None
        spec = job.plan.data_free_spec(layer) if without_data else job.plan.layer_spec(layer)
        try:
            solution = solve(weight, spec, seed, statistics)
        except torch.linalg.LinAlgError as error:
            raise not_decomposable(target.tensor, weight) from error
        encoded = FORMATS[recipe.format].encode(target, solution.quantized, GRIDS[spec.method.grid])
        tensors = {name: tensor.cpu() for name, tensor in encoded.items()}
    low_rank = solution.low_rank if solution else None
    tensors |= adapter.encode(target.module, low_rank, layer.rank, recipe.lora_scale, seed)
    row = LayerRow(
        name=target.name,
        shape=(target.module.out_features, target.module.in_features),
        bits=layer.bits if solution else None,
        group_size=layer.group_size if solution else None,
        rank=layer.rank,
        bytes_before=target.tensor.nbytes,
        bytes_after=layer.bytes_after,
        error_start=solution.quantized_error if solution else None,
        error=solution.error if solution else None,
        trace=solution.trace if solution else (),
        seconds=round(time.perf_counter() - started, 4),
        kept=layer.kept,
        output_error_start=solution.quantized_output_error if solution else None,
        output_error=solution.output_error if solution else None,
        tokens=statistics.tokens if statistics is not None else None,
    )
    job.store.put(layer, tensors, row)
    return row


def _polished(job: _Job) -> Generator[Event, None, None]:
    """Polish all adapters together and put them in the place of those that were fitted layer by layer."""
    if job.journal.find("polish") is None:
        yield from _polish(job)
    result, errors = apply_polish(job.store)
    job.calibration["polish"] = result
    if not result["kept"]:
        yield job.note("polish: did not lower the held-out loss, so the adapters stay as they were")
    for name, error in errors.items():
        # What the layer's output was off by was measured before; the polish trades it between layers.
        job.store.rows[name] = replace(job.store.rows[name], error=error, output_error=None)


def _polish(job: _Job) -> Generator[Event, None, None]:
    """Polish, measure the weight errors anew, and keep the result."""
    plan, store = job.plan, job.store
    layers = {layer.target.name: layer for layer in plan.quantized}
    assert job.samples is not None
    result: Polished = yield from polish(
        plan.checkpoint.directory,
        plan.checkpoint.config,
        {name: store.quantized(layer) for name, layer in layers.items()},
        {name: store.low_rank(layer) for name, layer in layers.items()},
        job.samples,
        steps=plan.recipe.polish,
        device=job.device,
        seed=plan.recipe.seed,
        trust_remote_code=plan.recipe.trust_remote_code,
    )
    errors: dict[str, float] = {}
    encoded: dict[str, torch.Tensor] = {}
    for name, low_rank in result.factors.items() if result.kept else ():
        layer = layers[name]
        weight = _read_weight(layer, job.device)
        residual = weight - store.quantized(layer).to(job.device)
        factors = LowRank(low_rank.B.to(job.device), low_rank.A.to(job.device))
        errors[name] = residual_norm(residual, factors) / residual_norm(weight, None)
        encoded |= adapter.encode(layer.target.module, low_rank, layer.rank, plan.recipe.lora_scale, 0)
    words = {"steps": result.steps, "held_out_before": result.before, "held_out_after": result.after}
    save_polish(store, {**words, "kept": result.kept}, errors, encoded)


def _checked_chunks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    bad = 0
    for chunk in tensor.chunks():
        bad += count_nonfinite(chunk.view(tensor.dtype))
        yield chunk
    require_finite(tensor, bad)
