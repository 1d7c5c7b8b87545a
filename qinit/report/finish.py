"""What goes into a run's directory beside its tensors: companions of the source, configurations, report and card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qinit.adapters import write_config
from qinit.files.manifest import write_manifest
from qinit.formats import FORMATS
from qinit.machine import versions
from qinit.plan import allocation as sensitivity
from qinit.plan.plan import Plan
from qinit.report.averages import relative_error
from qinit.report.card import write_card
from qinit.report.report import LayerRow, Report
from qinit.source.skeleton import loader


def copy_companions(plan: Plan, directory: Path) -> None:
    """Copy tokenizer and the like from the source."""
    for relative in plan.checkpoint.companions():
        destination = directory / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.directory / relative, destination)


def write_configurations(plan: Plan, directory: Path, out: Path) -> None:
    """Write what loaders read beside the tensors: base and adapter can be loaded then. `out` is where the directory
    goes."""
    base = str(out.resolve())
    if plan.given is not None:
        base = given_name(plan)
    config = plan.adapter.config(plan.recipe, plan.architecture, plan.ranks, base)
    write_config(plan.adapter_directory(directory), config)
    if plan.given is not None:
        return
    (directory / "config.json").write_text(json.dumps(base_config(plan), indent=2) + "\n", encoding="utf-8")


def given_name(plan: Plan) -> str:
    """Return what PEFT finds the base of an adapter by: its place, or its id on the Hub."""
    name = str(plan.recipe.base)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def complete(plan: Plan, report: Report, directory: Path) -> None:
    """Write all other files. The last one is the list of all with their sums."""
    report.write(directory)
    if plan.allocation is not None and plan.allocation.sensitivity is not None:
        plan.allocation.sensitivity.write(directory / sensitivity.SENSITIVITY_NAME)
    write_card(directory, report, plan.checkpoint.card_metadata())
    write_manifest(directory)


def base_config(plan: Plan) -> dict[str, Any]:
    """Return the base's config.json: the source's, and how the base is packed where it is."""
    grids = {layer.target.name: (layer.bits, layer.group_size) for layer in plan.quantized}
    kept = [module.name for module in plan.architecture.linear if module.name not in grids]
    config = dict(plan.checkpoint.config)
    fmt = FORMATS[plan.recipe.format]
    quantization = fmt.quantization_config(grids, kept, plan.architecture.classes)
    if quantization is not None:
        config["quantization_config"] = quantization
    return config


def make_report(
    plan: Plan,
    rows: tuple[LayerRow, ...],
    *,
    calibration: dict[str, Any],
    check: dict[str, Any] | None = None,
    notes: tuple[str, ...],
    command: str,
    seconds: float,
    peak_memory_bytes: int,
) -> Report:
    """Return the report of a run from its layers' rows, in the plan's order."""
    nominal = plan.recipe.nominal_bits if plan.given is None else None
    totals: dict[str, Any] = {
        "nominal_bits": round(plan.grid_bits_per_weight, 2) if nominal is None else nominal,
        "layers": len(plan.quantized),
        "layers_kept": len(plan.layers) - len(plan.quantized),
        "weights": plan.checkpoint.parameters,
        "quantized_weights": sum(layer.weights for layer in plan.quantized),
        "left": [share.to_json() for share in plan.shares],
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "grid_bits_per_weight": round(plan.grid_bits_per_weight, 4),
        "bytes_before": plan.bytes_before,
        "base_bytes": plan.base_bytes,
        "adapter_bytes": plan.adapter_bytes,
        "error_start": relative_error(rows, "error_start"),
        "error": relative_error(rows, "error"),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes,
    }
    if plan.given is not None:
        totals["base"] = {"name": given_name(plan), "form": plan.given.form}
    if plan.whole:
        totals["whole_bytes"] = sum(each.tensor.nbytes for each in plan.whole)
    if any(row.output_error is not None for row in rows):
        totals["output_error_start"] = relative_error(rows, "output_error_start")
        totals["output_error"] = relative_error(rows, "output_error")
    if calibration:
        totals["calibration"] = calibration
    if check is not None:
        totals["check"] = check
    if plan.allocation is not None:
        allocation = plan.allocation
        totals["allocation"] = {"allocation": allocation.how, "metric": allocation.metric}
        if allocation.sensitivity is not None:
            totals["allocation"] |= {key: getattr(allocation, key) for key in ("front", "chosen", "uniform")}
            if allocation.prices:
                totals["allocation"]["nats_per_megabyte"] = allocation.prices
    source = {"model": plan.model_name, "revision": plan.recipe.revision, "class": plan.architecture.class_name}
    by = loader(plan.checkpoint.config, plan.recipe.trust_remote_code).__name__
    if by != source["class"]:
        source["loader"] = by
    recipe = plan.recipe.model_dump()
    return Report(plan.model_name, command, recipe, source, versions(), totals, (*plan.notes, *notes), rows)
