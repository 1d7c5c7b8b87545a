"""The plan of a dry run as a person sees it, and as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qinit_cli.draw import Screen, allocation_words, size

from qinit.files.reading import printable

if TYPE_CHECKING:
    from qinit.plan.plan import Plan
    from qinit.planner.forecast import Forecast

CHECKPOINTING = {True: "with gradient checkpointing", False: "without"}
PARTS = ("base", "adapter", "optimizer", "activations", "logits", "working")


def draw_plan(screen: Screen, said: Forecast, out: Path) -> None:
    """Draw every layer of a plan, and what it will take."""
    from qinit_cli.layer_rows import rows_of

    from qinit.plan.shares import weight_words
    from qinit.planner.time import in_words

    plan = said.plan
    columns = ("layer", "shape", "bits", "group", "rank", "before", "after", "kept because")
    rows = []
    for name, layers in rows_of(plan):
        layer, module = layers[0], layers[0].target.module
        grid = ["-", "-"] if layer.kept else [str(layer.bits), str(layer.group_size)]
        before, after = sum(each.target.nbytes for each in layers), sum(each.bytes_after for each in layers)
        shape = f"{module.out_features} x {module.in_features}"
        rows.append([printable(name), shape, *grid, str(layer.rank), size(before), size(after), layer.kept or ""])
    screen.table(*columns, rows=rows)
    if plan.recipe.mixed:
        for line in allocation_words(plan):
            screen.say(line)
    screen.facts(
        f"plan for {plan.model_name}: method {plan.recipe.method}, format {plan.recipe.format}",
        {
            "layers": f"{len(plan.quantized)} quantized of {len(plan.architecture.modules)} linear",
            **weight_words(
                sum(layer.weights for layer in plan.quantized),
                plan.checkpoint.parameters,
                [share.to_json() for share in plan.shares],
            ),
            "bits per weight": f"{plan.bits_per_weight:.3f} as stored",
            "weights on disk": f"{size(plan.bytes_before)} -> {size(plan.base_bytes)} base "
            f"+ {size(plan.adapter_bytes)} adapter",
            "calibration": _calibration_words(plan),
            "device": f"{said.where}, {size(said.card.memory)}{' each' if said.asked.processes > 1 else ''}",
            "working memory": f"about {size(said.working_bytes)} beside the libraries"
            + (", in each process" if said.asked.processes > 1 else ""),
            "time": f"{in_words(said.seconds, said.place)}, {said.origin}",
            "would be written to": str(out),
        },
    )
    _draw_tuning(screen, said)
    for note in plan.notes:
        screen.say(f"note: {note}")


def _draw_tuning(screen: Screen, said: Forecast) -> None:
    """Draw what fine-tuning takes after the run, against the memory of the device."""
    title = f"fine-tuning on {said.asked.train_batch} x {said.asked.train_length} tokens"
    rows = []
    for checkpointing, tuning in said.tuning.items():
        fits = "fits" if tuning.total <= said.card.memory else "does not fit"
        parts = (size(getattr(tuning, part)) for part in PARTS)
        verdict = f"{fits} into {size(said.card.memory)}"
        rows.append([CHECKPOINTING[checkpointing], *parts, size(tuning.total), verdict])
    screen.table(title, *PARTS, "peak", "", rows=rows)


def draw_qualities(screen: Screen, found: dict[str, Forecast]) -> None:
    """Draw what each quality would take, and what it has given elsewhere."""
    from qinit.planner.quality import found_words
    from qinit.words import duration

    columns = ("--quality", "calibration", "polish", "time", "memory", "SmolLM2-135M gave")
    rows = [
        [
            name,
            _calibration_words(said.plan).split(", then ")[0],
            f"{said.plan.recipe.polish} steps" if said.plan.recipe.polish else "-",
            duration(said.seconds.total),
            size(said.working_bytes),
            found_words(said.plan.recipe) or "-",
        ]
        for name, said in found.items()
    ]
    screen.table(*columns, rows=rows)


def write_plan(said: Forecast, out: Path) -> None:
    """Write a plan and what it will take as JSON to stdout."""
    plan = said.plan
    layers = [
        {
            "name": layer.target.name,
            "shape": [layer.target.module.out_features, layer.target.module.in_features],
            "bits": None if layer.kept else layer.bits,
            "group_size": None if layer.kept else layer.group_size,
            "rank": layer.rank,
            "bytes_before": layer.target.nbytes,
            "bytes_after": layer.bytes_after,
            "kept": layer.kept,
        }
        for layer in plan.layers
    ]
    tuning = {
        name: {**asdict(said.tuning[checkpointing]), "total": said.tuning[checkpointing].total}
        for name, checkpointing in (("checkpointing", True), ("without", False))
    }
    value: dict[str, Any] = {
        "directory": str(out.resolve()),
        "recipe": plan.recipe.model_dump(),
        "bits_per_weight": plan.bits_per_weight,
        "grid_bits_per_weight": plan.grid_bits_per_weight,
        "pending": plan.pending,
        "weights": plan.checkpoint.parameters,
        "quantized_weights": sum(layer.weights for layer in plan.quantized),
        "left": [share.to_json() for share in plan.shares],
        "bytes_before": plan.bytes_before,
        "base_bytes": plan.base_bytes,
        "adapter_bytes": plan.adapter_bytes,
        "device": asdict(said.card),
        "processes": said.asked.processes,
        "working_bytes": said.working_bytes,
        "seconds": {**asdict(said.seconds), "total": said.seconds.total},
        "seconds_origin": said.origin,
        "fine_tuning": {"length": said.asked.train_length, "batch": said.asked.train_batch, **tuning},
        "notes": list(plan.notes),
        "layers": layers,
    }
    sys.stdout.write(json.dumps(value) + "\n")


def _calibration_words(plan: Plan) -> str:
    recipe = plan.recipe
    if not recipe.calibrated:
        return "none"
    size = f"{recipe.calibration_samples} samples of up to {recipe.calibration_length} tokens"
    return f"{recipe.calibration}, {size}" + (f", then {recipe.polish} steps of polish" if recipe.polish else "")
