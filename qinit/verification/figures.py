"""The report against itself: its rows against its recipe, its totals against its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from qinit.adapters import ADAPTERS
from qinit.recipe import Recipe
from qinit.report.averages import average
from qinit.report.report import REPORT_NAME, LayerRow, Report
from qinit.source.targets import LinearModule
from qinit.verification.findings import Finding
from qinit.widths.budget import GROUP_FACTORS

ROUNDING = 1e-9  # the sums are made anew from the same numbers


def check_rows(report: Report, recipe: Recipe) -> Iterator[Finding]:
    """Name each row that no run of this recipe can have. What comes later relies on sound rows."""
    names = [row.name for row in report.layers]
    for name in sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        yield Finding(REPORT_NAME, f"{name} has more than one row")
    if all(row.kept is not None for row in report.layers):
        yield Finding(REPORT_NAME, "no layer is quantized")
    for row in report.layers:
        for key, expected, fits in _bounds(row, recipe):
            if not fits:
                yield Finding(REPORT_NAME, f"{row.name}: {key}", expected, getattr(row, key))


def _bounds(row: LayerRow, recipe: Recipe) -> Iterator[tuple[str, Any, bool]]:
    """Yield a row's fields, what each of them may be, and whether it is that."""
    yield "shape", "two counts", min(row.shape) > 0
    most = max(min(row.shape), 0)
    bare = row.rank == 0 and row.name.endswith("]")  # an expert without an adapter
    if not recipe.chooses_ranks:
        yield "rank", min(recipe.rank, most), row.rank == min(recipe.rank, most) or bare
    else:
        yield "rank", f"1 to {most}", 1 <= row.rank <= most or bare
    for key in ("error_start", "error", "output_error_start", "output_error"):
        value = getattr(row, key)
        yield key, "a finite size", value is None or 0 <= value < 1e100
    if row.kept is not None:
        for key in ("bits", "group_size", "error_start", "error"):
            yield key, "nothing, as the layer was kept", getattr(row, key) is None
        return
    if recipe.base is not None:  # the widths are the base's own
        return
    yield "bits", " or ".join(map(str, recipe.widths)), row.bits in recipe.widths
    sizes = [min(recipe.group_size, row.shape[1])]
    if recipe.joint:
        sizes += [min(int(recipe.group_size * factor), row.shape[1]) for factor in GROUP_FACTORS]
    yield "group_size", " or ".join(map(str, sorted(set(sizes)))), row.group_size in sizes
    for key in ("error_start", "error"):
        yield key, "a number", getattr(row, key) is not None


def check_totals(report: Report, recipe: Recipe) -> Iterator[Finding]:
    """Compare the report's totals with its rows, which must be sound."""
    adapter = ADAPTERS[recipe.adapter]
    quantized = [row for row in report.layers if row.kept is None]
    whole, rows = report.totals.get("whole_bytes", 0), [row for row in report.layers if row.rank]
    factors = sum(spec.nbytes for row in rows for spec in adapter.specs(_module(row), row.rank))
    weights = sum(row.shape[0] * row.shape[1] for row in quantized)
    expected: dict[str, float] = {
        "layers": len(quantized),
        "layers_kept": len(report.layers) - len(quantized),
        "quantized_weights": weights,
        "bits_per_weight": round(8 * sum(row.bytes_after for row in quantized) / weights, 4),
        "adapter_bytes": factors + (whole if type(whole) is int else 0),
    }
    for key in ("error_start", "error", "output_error_start", "output_error"):
        if (value := average(report.layers, key)) is not None:
            expected[key] = value
    for key, made_anew in expected.items():
        found = report.totals.get(key)
        if not isinstance(found, int | float) or not math.isclose(found, made_anew, rel_tol=ROUNDING):
            yield Finding(REPORT_NAME, f"totals: {key}, made anew from the rows", made_anew, found)
    if "check" in report.totals:  # runs by an older qinit, and those that were asked for none, have none
        yield from check_check(report.totals["check"])


def check_check(found: Any) -> Iterator[Finding]:
    """Name what no run can have measured itself to be at its end."""
    if not isinstance(found, dict):
        yield Finding(REPORT_NAME, "totals: check", "an object", found)
        return
    least = {"tokens": 1, "perplexity": 1, "reference_perplexity": 1, "kl": -ROUNDING, "top1_agreement": 0}
    for key, low in least.items():
        value: Any = found.get(key)
        most, to = (1, " to 1") if key == "top1_agreement" else (math.inf, "")
        if type(value) not in (int, float) or not low <= value <= most:
            yield Finding(REPORT_NAME, f"totals: check.{key}", f"a number from {max(low, 0)} up{to}", value)
    if not isinstance(found.get("text"), str):
        yield Finding(REPORT_NAME, "totals: check.text", "the text's name", found.get("text"))


def _module(row: LayerRow) -> LinearModule:
    return LinearModule(row.name, *row.shape, transposed=False)
