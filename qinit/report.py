"""The report of a run: what was asked, what was written and how close it is. Kept as qinit.json."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

REPORT_NAME = "qinit.json"
PACKAGES = ("qinit", "torch", "transformers", "peft", "numba", "numpy")


@dataclass(frozen=True)
class LayerRow:
    """One layer's result. Errors are Frobenius norms relative to the weight's: `error_start` of Q alone
    (what a trainer without the adapter would get), `error` of Q + s B A; None for a layer kept as it is. With
    calibration, the output errors are the same relative to the layer's output, and `tokens` were seen."""

    name: str
    shape: tuple[int, int]
    bits: int | None
    group_size: int | None
    rank: int
    bytes_before: int
    bytes_after: int
    error_start: float | None
    error: float | None
    trace: tuple[float, ...]
    seconds: float
    kept: str | None = None
    output_error_start: float | None = None
    output_error: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Report:
    """A run's report; `to_json` is what qinit.json holds."""

    model: str
    command: str
    recipe: dict[str, Any]
    source: dict[str, Any]
    versions: dict[str, str]
    totals: dict[str, Any]
    notes: tuple[str, ...]
    layers: tuple[LayerRow, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def write(self, directory: Path) -> None:
        (directory / REPORT_NAME).write_text(self.to_json(), encoding="utf-8")


def relative_error(rows: tuple[LayerRow, ...], field: str) -> float:
    """The root mean square over layers of a relative error, each weighted by its number of weights."""
    values = [(row.shape[0] * row.shape[1], getattr(row, field)) for row in rows if row.kept is None]
    measured = [(count, value) for count, value in values if value is not None]
    total = sum(count for count, _ in measured)
    return (sum(count * value**2 for count, value in measured) / total) ** 0.5


def versions() -> dict[str, str]:
    """Versions of everything that can change a byte of the output."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_memory_bytes() -> int:
    """The process's peak resident memory so far."""
    try:
        import resource
    except ImportError:  # pragma: no cover - Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
