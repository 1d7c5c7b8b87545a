"""The report of a training: what was asked, what came of it, and its course. Kept as qinit.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from qinit.machine import ran_on, versions
from qinit.snndlft.course import Course
from qinit.snndlft.energy import energy
from qinit.snndlft.importance import MIX

KIND = "snndlft"


@dataclass(frozen=True)
class LayerRow:
    """A layer at the end: its adapted modules, triplets in use, steps that it trained in, and its last spike rate."""

    name: str
    modules: int
    ranks: int
    steps: int
    rate: float | None


@dataclass(frozen=True)
class SnnReport:
    """A training's report; `to_json` is what qinit.json holds. `moments` are as in Moment."""

    kind: str
    model: str
    command: str
    config: dict[str, Any]
    training: dict[str, Any]
    classes: tuple[str, ...] | None
    totals: dict[str, Any]
    layers: tuple[LayerRow, ...]
    moments: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    machine: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def make_report(
    course: Course,
    *,
    model: str,
    command: str,
    training: dict[str, Any],
    classes: tuple[str, ...] | None,
    measured: dict[str, Any],
    notes: tuple[str, ...],
) -> SnnReport:
    """Return the report of a finished course; `measured` goes into its totals."""
    config, end = course.config, course.moments[-1]
    rows = tuple(
        LayerRow(layer.name, len(layer.modules), layer.ranks, course.steps[layer.name], end.rates.get(layer.name))
        for layer in course.layers
    )
    totals: dict[str, Any] = {
        **measured,
        "layers": len(rows),
        "layers_trained": len(end.trained),
        "modules": sum(row.modules for row in rows),
        "ranks": sum(row.ranks for row in rows),
        "trainable": end.trainable,
        "trainable_in_use": end.kept,
        "trainable_all_layers": sum(layer.size for layer in course.layers),
        "optimizer_bytes": end.state_bytes,
        "mix": MIX,
    }
    if end.rates:
        totals["spike_rate"] = sum(end.rates.values()) / len(end.rates)
        estimate = energy(course.layers, end.rates, config.time_steps)
        totals["energy_per_token"] = {
            **asdict(estimate),
            "unit": "joule, of the adapters alone, estimated from operation counts (qinit/snndlft/energy.py)",
        }
    return SnnReport(
        KIND, model, command, config.model_dump(mode="json"), training, classes, totals, rows,
        tuple(asdict(moment) for moment in course.moments), notes, versions(), ran_on(),
    )  # fmt: skip
