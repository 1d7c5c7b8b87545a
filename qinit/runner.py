"""Carries out a plan: reads one tensor at a time, solves, writes, and yields what happens.

Everything is written beside the target under a temporary name and renamed at the end, so a run that was
killed or failed never looks finished.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from qinit import adapter
from qinit.card import write_card
from qinit.checkpoint import count_nonfinite, require_finite
from qinit.errors import OutputError, RecipeError
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.plan import LayerPlan, Plan
from qinit.report import REPORT_NAME, LayerRow, Report, peak_memory_bytes, relative_error, versions
from qinit.safetensors_io import SafetensorsWriter, StoredTensor
from qinit.solver import seed_of, solve


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


Event = Working | Done | Finished


def pick_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`; raises RecipeError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or 0)  # torch.device wraps large ones around
        if index >= count:
            raise RecipeError(f"device: no '{name}' here, torch sees {count} CUDA devices; use --device cpu or auto")
        return torch.device("cuda", index)
    return torch.device(name)


def check_output(plan: Plan, out: Path, overwrite: bool) -> None:
    """Raise OutputError if the result cannot go to `out`: it exists, holds something else, or lacks space."""
    try:
        _check_output(plan, out, overwrite)
    except OSError as error:
        raise OutputError(f"{out}: cannot be looked at ({error.strerror}); choose another place with --out") from None


def _check_output(plan: Plan, out: Path, overwrite: bool) -> None:
    source = plan.checkpoint.directory.resolve()
    if out.resolve() == source or out.resolve() in source.parents or source in out.resolve().parents:
        raise OutputError(f"{out}: is, holds or lies in the source {source}; choose another place with --out")
    if out.exists():
        if not out.is_dir():
            raise OutputError(f"{out}: exists and is no directory; choose another place with --out")
        if any(out.iterdir()):
            if not overwrite:
                raise OutputError(f"{out}: exists; pass --overwrite to replace it, or choose another place with --out")
            if not (out / REPORT_NAME).is_file():
                raise OutputError(
                    f"{out}: exists and has no {REPORT_NAME}, so qinit did not write it and will not replace it; "
                    "choose another place with --out"
                )
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    needed = plan.base_bytes + plan.adapter_bytes
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError(f"{out}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there")


def run(plan: Plan, out: Path, *, overwrite: bool = False, command: str = "") -> Generator[Event, None, None]:
    """Carry out a plan and put the result at `out`; yields events, the last one is Finished.

    Raises OutputError, CheckpointError (a damaged tensor) and RecipeError; then nothing is left at `out`.
    """
    check_output(plan, out, overwrite)
    device = pick_device(plan.recipe.device)
    started = time.perf_counter()
    rows: list[LayerRow] = []
    with _placed(out) as directory:
        _copy_companions(plan, directory)
        adapter_directory = directory / adapter.ADAPTER_DIRECTORY
        adapter_directory.mkdir()
        base = SafetensorsWriter(directory, plan.base_specs, max_bytes=plan.max_shard_bytes)
        factors = SafetensorsWriter(adapter_directory, plan.adapter_specs, stem=adapter.WEIGHTS_STEM)
        by_tensor = {layer.target.tensor.name: layer for layer in plan.layers}
        for name, tensor in plan.checkpoint.tensors.items():
            yield Working(name, tensor.nbytes)
            layer = by_tensor.get(name)
            row = None
            if layer is None or layer.kept:
                base.write_chunks(name, _checked_chunks(tensor))
            if layer is not None:
                row = _solve_layer(plan, layer, device, base, factors)
                rows.append(row)
            yield Done(name, tensor.nbytes, row)
        base.close()
        factors.close()
        modules = [(layer.target.module, layer.rank) for layer in plan.layers]
        config = adapter.adapter_config(plan.recipe, plan.architecture, modules, str(out.resolve()))
        adapter.write_config(adapter_directory, config)
        _write_config(plan, directory)
        report = _report(plan, tuple(rows), time.perf_counter() - started, command)
        report.write(directory)
        write_card(directory, report, plan)
    yield Finished(report, out)


def _solve_layer(
    plan: Plan, layer: LayerPlan, device: torch.device, base: SafetensorsWriter, factors: SafetensorsWriter
) -> LayerRow:
    """Solve one layer and write both of its parts; a kept layer only gets a fresh adapter."""
    started = time.perf_counter()
    target, recipe = layer.target, plan.recipe
    seed = seed_of(target.name, recipe.seed)
    solution = None
    if layer.kept is None:
        raw = target.tensor.read()
        require_finite(target.tensor, count_nonfinite(raw))
        weight = (raw.T if target.module.transposed else raw).to(device, torch.float32).contiguous()
        del raw
        solution = solve(weight, plan.layer_spec(layer), seed)
        del weight
        grid = GRIDS[recipe.row.grid]
        for name, tensor in FORMATS[recipe.format].encode(target, solution.quantized, grid).items():
            base.write(name, tensor.cpu())
    low_rank = solution.low_rank if solution else None
    for name, tensor in adapter.encode(target.module, low_rank, layer.rank, recipe.lora_scale, seed).items():
        factors.write(name, tensor)
    return LayerRow(
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
    )


def _checked_chunks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    bad = 0
    for chunk in tensor.chunks():
        bad += count_nonfinite(chunk.view(tensor.dtype))
        yield chunk
    require_finite(tensor, bad)


@contextmanager
def _placed(out: Path) -> Iterator[Path]:
    """Give a temporary directory beside `out`; rename it to `out` on success, remove it on any failure."""
    final = out.resolve()  # `out` may be a link: what it points to is replaced, not the link
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _swap(partial, final)
    except OSError as error:
        where = f": {Path(error.filename).name}" if error.filename else ""
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error}{where}); nothing was left there"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`; an older `final` is put back if that fails, and removed if it succeeds."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _copy_companions(plan: Plan, directory: Path) -> None:
    for relative in plan.checkpoint.companions():
        destination = directory / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.directory / relative, destination)


def _write_config(plan: Plan, directory: Path) -> None:
    import json

    quantized = [layer.target.name for layer in plan.quantized]
    kept = [module.name for module in plan.architecture.linear if module.name not in set(quantized)]
    config = dict(plan.checkpoint.config)
    fmt = FORMATS[plan.recipe.format]
    quantization = fmt.quantization_config(plan.recipe.bits, plan.recipe.group_size, quantized, kept)
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _report(plan: Plan, rows: tuple[LayerRow, ...], seconds: float, command: str) -> Report:
    totals = {
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
    source = {"model": plan.model_name, "revision": plan.recipe.revision, "class": plan.architecture.class_name}
    recipe = plan.recipe.model_dump()
    return Report(plan.model_name, command, recipe, source, versions(), totals, plan.notes, rows)
