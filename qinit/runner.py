"""Carries out a plan: reads one tensor at a time, solves, writes, and yields what happens.

Everything is written beside the target under a temporary name and renamed at the end, so a run that was
killed or failed never looks finished.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qinit import adapter, sensitivity
from qinit.calibration import Samples, Statistics
from qinit.calibration.blocks import NotStreamable
from qinit.calibration.choice import text_for
from qinit.calibration.walk import Measuring, Seen, Walk
from qinit.calibration.whole import whole_model
from qinit.card import write_card
from qinit.checkpoint import count_nonfinite, not_decomposable, require_finite
from qinit.device import pick_device
from qinit.errors import CalibrationError
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.lowrank import LowRank
from qinit.mixed import allotted, options
from qinit.output import check_output, check_space, placed
from qinit.plan import LayerPlan, Plan
from qinit.polish import Polished, Progress, polish
from qinit.report import LayerRow, Report, peak_memory_bytes, relative_error, versions
from qinit.safetensors_io import SafetensorsWriter, StoredTensor
from qinit.solver import residual_norm, seed_of, solve, stored


@dataclass(frozen=True)
class Working:
    """A tensor has been taken up; `nbytes` is its size in the source."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Done:
    """A tensor has been written; `row` is its result, None for one that was copied."""

    name: str
    nbytes: int
    row: LayerRow | None


@dataclass(frozen=True)
class Finished:
    """The run is complete and in its place."""

    report: Report
    directory: Path


@dataclass(frozen=True)
class Sampling:
    """The calibration text is being read or written."""

    source: str


@dataclass(frozen=True)
class Allotted:
    """Every layer's width is known; `plan` has them."""

    plan: Plan


@dataclass(frozen=True)
class Noted:
    """Something that a user should know has turned up; it is in the report too."""

    text: str


Event = Sampling | Measuring | Allotted | Noted | Working | Done | Progress | Finished


def run(
    plan: Plan, out: Path, *, overwrite: bool = False, command: str = "", token: str | None = None
) -> Generator[Event, None, None]:
    """Carry out a plan and put the result at `out`; yields events, the last one is Finished.

    `token` opens a private data set for calibration on the Hub; it is written nowhere.
    Raises OutputError, CheckpointError (a damaged tensor), CalibrationError, HubError and RecipeError; then nothing
    is left at `out`.
    """
    check_output(plan, out, overwrite)
    device = pick_device(plan.recipe.device)
    started = time.perf_counter()
    with placed(out) as directory:
        samples = None
        if plan.pending:
            plan, samples = yield from _allotted(plan, directory, device, token)
            check_space(plan, out)
        _copy_companions(plan, directory)
        adapter_directory = directory / adapter.ADAPTER_DIRECTORY
        adapter_directory.mkdir()
        job = _Job(
            plan,
            device,
            base=SafetensorsWriter(directory, plan.base_specs, max_bytes=plan.max_shard_bytes),
            factors=SafetensorsWriter(adapter_directory, plan.adapter_specs, stem=adapter.WEIGHTS_STEM),
        )
        if plan.recipe.calibrated:
            yield from _calibrated(job, directory, samples, token)
        for name, tensor in plan.checkpoint.tensors.items():
            layer = job.by_tensor.get(name)
            if layer is not None and layer.target.name in job.rows:
                continue
            yield Working(name, tensor.nbytes)
            if layer is None or layer.kept:
                job.base.write_chunks(name, _checked_chunks(tensor))
            row = None if layer is None else _solve_alone(job, layer)
            yield Done(name, tensor.nbytes, row)
        if plan.recipe.polish:
            yield from _polished(job)
        job.base.close()
        job.factors.close()
        modules = [(layer.target.module, layer.rank) for layer in plan.layers]
        config = adapter.adapter_config(plan.recipe, plan.architecture, modules, str(out.resolve()))
        adapter.write_config(adapter_directory, config)
        _write_config(plan, directory)
        report = _report(job, time.perf_counter() - started, command)
        report.write(directory)
        if plan.allocation is not None and plan.allocation.sensitivity is not None:
            plan.allocation.sensitivity.write(directory / sensitivity.SENSITIVITY_NAME)
        write_card(directory, report, plan)
    yield Finished(report, out)


@dataclass
class _Job:
    """A run under way: where it writes to, and what is known so far. `held` keeps Q and L of every layer for the
    polish, which needs them all at once."""

    plan: Plan
    device: torch.device
    base: SafetensorsWriter
    factors: SafetensorsWriter
    rows: dict[str, LayerRow] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    held: dict[str, tuple[torch.Tensor, LowRank]] = field(default_factory=dict)
    samples: Samples | None = None
    calibration: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def by_tensor(self) -> dict[str, LayerPlan]:
        return {layer.target.tensor.name: layer for layer in self.plan.layers}

    def note(self, text: str) -> Noted:
        self.notes.append(text)
        return Noted(text)


def _allotted(
    plan: Plan, directory: Path, device: torch.device, token: str | None
) -> Generator[Event, None, tuple[Plan, Samples]]:
    """Measure how sensitive each layer is and choose the widths; returns the plan with them, and the text."""
    yield Sampling(plan.recipe.calibration if plan.recipe.calibrated else "self")
    samples = text_for(plan, device, token)
    measured = yield from sensitivity.measure(plan, options(plan), samples, device, directory)
    plan = allotted(plan, measured)
    yield Allotted(plan)
    return plan, samples


def _calibrated(job: _Job, directory: Path, samples: Samples | None, token: str | None) -> Generator[Event, None, None]:
    """Solve every layer that the calibration text reaches, as what it sees becomes known."""
    plan, recipe = job.plan, job.plan.recipe
    if samples is None:
        yield Sampling(recipe.calibration)
        samples = text_for(plan, job.device, token)
    if recipe.polish and len(samples.tokens) < 2:  # it would say so itself, after everything else
        raise CalibrationError(
            "polish: needs at least 2 samples, one to learn from and one to check on, found "
            f"{len(samples.tokens)} ({samples.origin}); give more or longer text"
        )
    job.samples = samples
    job.calibration = {"text": samples.origin, "tokens": samples.count}
    widest = max(layer.target.module.in_features for layer in plan.quantized)
    if samples.count < widest:
        yield job.note(
            f"calibration: {samples.count} tokens are fewer than the {widest} inputs of the widest layer, so H is "
            f"singular and damped more; {8 * widest} or more are better"
        )
    for event in _walk(job, samples, directory):
        if isinstance(event, Measuring | Noted):
            yield event
            continue
        layer = event.layer
        yield Working(layer.target.tensor.name, layer.target.tensor.nbytes)
        if event.statistics is None:
            yield job.note(f"{layer.target.name}: never reached by the calibration text, so solved without data")
        row, repaired = _solve_layer(job, layer, event.weight, event.statistics)
        if event.repair is not None:
            event.repair(layer, repaired)
        yield Done(layer.target.tensor.name, layer.target.tensor.nbytes, row)
    for layer in plan.quantized:
        if layer.target.name not in job.rows:
            yield job.note(f"{layer.target.name}: lies outside of the model's blocks, so solved without data")


def _walk(job: _Job, samples: Samples, directory: Path) -> Iterator[Measuring | Noted | Seen]:
    """Walk block by block, or take the whole model where that is not possible."""
    plan = job.plan
    if plan.recipe.row.metric != "fisher":
        try:
            yield from Walk(plan, samples, job.device, plan.recipe.calibration_mode, scratch=directory)
            return
        except NotStreamable as reason:
            if job.rows:
                raise CalibrationError(
                    f"{plan.checkpoint.directory}: {reason}; use --calibration none or --calibration-mode parallel"
                ) from None
            yield job.note(f"calibration with the whole model in memory: {reason}")
    yield from whole_model(plan, samples, job.device)


def _solve_alone(job: _Job, layer: LayerPlan) -> LayerRow:
    """Read and solve one layer without data; a kept layer only gets a fresh adapter."""
    weight = None
    if layer.kept is None:
        weight = _read_weight(layer, job.device)
    row, _ = _solve_layer(job, layer, weight, None)
    return row


def _read_weight(layer: LayerPlan, device: torch.device) -> torch.Tensor:
    target = layer.target
    raw = target.tensor.read()
    require_finite(target.tensor, count_nonfinite(raw))
    return (raw.T if target.module.transposed else raw).to(device, torch.float32).contiguous()


def _solve_layer(
    job: _Job, layer: LayerPlan, weight: torch.Tensor | None, statistics: Statistics | None
) -> tuple[LayerRow, torch.Tensor]:
    """Solve one layer and write both of its parts; returns also Q + L, what the trainer will have."""
    started = time.perf_counter()
    target, recipe = layer.target, job.plan.recipe
    seed = seed_of(target.name, recipe.seed)
    solution, repaired = None, torch.empty(0)
    if weight is not None:
        without_data = recipe.calibrated and statistics is None
        spec = job.plan.data_free_spec(layer) if without_data else job.plan.layer_spec(layer)
        try:
            solution = solve(weight, spec, seed, statistics)
        except torch.linalg.LinAlgError as error:
            raise not_decomposable(target.tensor, weight) from error
        for name, tensor in FORMATS[recipe.format].encode(target, solution.quantized, GRIDS[spec.method.grid]).items():
            job.base.write(name, tensor.cpu())
        if recipe.calibrated:
            repaired = stored(solution.quantized, spec)
            if recipe.polish and solution.low_rank is not None:
                job.held[target.name] = (repaired.clone(), solution.low_rank)
            if solution.low_rank is not None:
                repaired.addmm_(solution.low_rank.B, solution.low_rank.A)
    low_rank = solution.low_rank if solution else None
    if target.name not in job.held:
        for name, tensor in adapter.encode(target.module, low_rank, layer.rank, recipe.lora_scale, seed).items():
            job.factors.write(name, tensor)
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
    job.rows[target.name] = row
    return row, repaired


def _polished(job: _Job) -> Generator[Event, None, None]:
    """Polish all adapters together, write them, and measure the weight errors anew."""
    plan, recipe = job.plan, job.plan.recipe
    assert job.samples is not None
    events = polish(
        plan.checkpoint.directory,
        plan.checkpoint.config,
        {name: base for name, (base, _) in job.held.items()},
        {name: low_rank for name, (_, low_rank) in job.held.items()},
        job.samples,
        steps=recipe.polish,
        device=job.device,
        seed=recipe.seed,
        trust_remote_code=recipe.trust_remote_code,
    )
    while True:
        try:
            yield next(events)
        except StopIteration as stop:
            result: Polished = stop.value
            break
    job.calibration["polish"] = {
        "steps": result.steps,
        "held_out_before": result.before,
        "held_out_after": result.after,
        "kept": result.kept,
    }
    if not result.kept:
        yield job.note("polish: did not lower the held-out loss, so the adapters stay as they were")
    layers = {layer.target.name: layer for layer in plan.quantized}
    for name, low_rank in result.factors.items():
        layer = layers[name]
        seed = seed_of(name, recipe.seed)
        encoded = adapter.encode(layer.target.module, low_rank, layer.rank, recipe.lora_scale, seed)
        for key, tensor in encoded.items():
            job.factors.write(key, tensor)
        if result.kept:
            weight = _read_weight(layer, job.device)
            residual = job.held[name][0].neg().add_(weight)
            error = residual_norm(residual, low_rank) / residual_norm(weight, None)
            # What the layer's output was off by was measured before; the polish trades it between layers.
            job.rows[name] = replace(job.rows[name], error=error, output_error=None)


def _checked_chunks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    bad = 0
    for chunk in tensor.chunks():
        bad += count_nonfinite(chunk.view(tensor.dtype))
        yield chunk
    require_finite(tensor, bad)


def _copy_companions(plan: Plan, directory: Path) -> None:
    for relative in plan.checkpoint.companions():
        destination = directory / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.directory / relative, destination)


def _write_config(plan: Plan, directory: Path) -> None:
    import json

    widths = {layer.target.name: layer.bits for layer in plan.quantized}
    kept = [module.name for module in plan.architecture.linear if module.name not in widths]
    config = dict(plan.checkpoint.config)
    fmt = FORMATS[plan.recipe.format]
    quantization = fmt.quantization_config(widths, plan.recipe.group_size, kept)
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _report(job: _Job, seconds: float, command: str) -> Report:
    plan = job.plan
    rows = tuple(job.rows[layer.target.name] for layer in plan.layers)
    totals: dict[str, Any] = {
        "nominal_bits": plan.recipe.nominal_bits,
        "layers": len(plan.quantized),
        "layers_kept": len(plan.layers) - len(plan.quantized),
        "quantized_weights": sum(layer.weights for layer in plan.quantized),
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "grid_bits_per_weight": round(plan.grid_bits_per_weight, 4),
        "bytes_before": plan.bytes_before,
        "base_bytes": plan.base_bytes,
        "adapter_bytes": plan.adapter_bytes,
        "error_start": relative_error(rows, "error_start"),
        "error": relative_error(rows, "error"),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if any(row.output_error is not None for row in rows):
        totals["output_error_start"] = relative_error(rows, "output_error_start")
        totals["output_error"] = relative_error(rows, "output_error")
    if job.calibration:
        totals["calibration"] = job.calibration
    if plan.allocation is not None:
        allocation = plan.allocation
        totals["allocation"] = {"allocation": allocation.how, "metric": allocation.metric}
        if allocation.sensitivity is not None:
            totals["allocation"] |= {key: getattr(allocation, key) for key in ("front", "chosen", "uniform")}
    source = {"model": plan.model_name, "revision": plan.recipe.revision, "class": plan.architecture.class_name}
    recipe = plan.recipe.model_dump()
    return Report(plan.model_name, command, recipe, source, versions(), totals, (*plan.notes, *job.notes), rows)
