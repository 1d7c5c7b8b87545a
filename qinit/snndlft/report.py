"""The report of a training: what was asked, what came of it, and its course. Kept as qinit.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qinit.errors import ReportError
from qinit.files.reading import read_regular
from qinit.machine import ran_on, versions
from qinit.report.report import REPORT_BYTES, REPORT_NAME, first_wrong
from qinit.snndlft.course import Course, Moment
from qinit.snndlft.energy import energy
from qinit.snndlft.importance import MIX

# What whoever draws a report needs of its totals.
NUMBERS = (
    *("before", "after", "layers", "layers_trained", "modules", "ranks", "trainable", "trainable_in_use"),
    *("trainable_all_layers", "head", "optimizer_bytes", "seconds_per_step", "peak_memory_bytes"),
)


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
    """A training's report; `to_json` is what qinit.json holds."""

    kind: Literal["snndlft"]
    model: str
    command: str
    config: dict[str, Any]
    training: dict[str, Any]
    classes: tuple[str, ...] | None
    totals: dict[str, Any]
    layers: Annotated[tuple[LayerRow, ...], Field(min_length=1)]
    moments: Annotated[tuple[Moment, ...], Field(min_length=1)]
    notes: tuple[str, ...]
    versions: dict[str, str]
    machine: dict[str, Any]

    @property
    def spiking(self) -> bool:
        return bool(self.config["spiking"])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> SnnReport:
        """Read the report in a training's directory; keys of a later qinit are passed over. Raises ReportError."""
        from pydantic import TypeAdapter, ValidationError

        path, remedy = directory / REPORT_NAME, "pass the directory that `qinit snndlft` wrote"
        try:
            report = TypeAdapter(cls).validate_json(read_regular(path, REPORT_BYTES), strict=True)
        except OSError as error:
            raise ReportError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
        except ValidationError as error:
            raise ReportError(f"{path}: not the report of a training ({first_wrong(error)}); {remedy}") from None
        if (lost := _incomplete(report)) is not None:
            raise ReportError(f"{path}: not the report of a training ({lost} is not there); {remedy}")
        return report


def _incomplete(report: SnnReport) -> str | None:
    """Return the first thing that a report lacks."""
    wanted = [(report.config, "config", ("spiking", "layer_wise", "time_steps")), (report.totals, "totals", NUMBERS)]
    wanted += [(report.training, "training", ("steps", "data")), (report.totals, "totals", ("metric",))]
    for values, name, keys in wanted:
        for key in keys:
            if key not in values or (keys is NUMBERS and not isinstance(values[key], int | float)):
                return f"{name}.{key}"
    names = {row.name for row in report.layers}
    return None if all(names == moment.ranks.keys() for moment in report.moments) else "a layer of moments"


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
        "snndlft", model, command, config.model_dump(mode="json"), training, classes, totals, rows,
        tuple(course.moments), notes, versions(), ran_on(),
    )  # fmt: skip
