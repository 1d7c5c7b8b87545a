"""What the pictures of a report show: its layers by module type and number, its Pareto front, its totals in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qinit.errors import ReportError
from qinit.plan.shares import weight_words
from qinit.report.averages import average, mean_bits, places
from qinit.report.check import check_words
from qinit.report.report import LayerRow, Report

NO_FRONT = "no losses were predicted in this run, so there is no Pareto front"
PANELS = (("weight", "error_start", "error"), ("output", "output_error_start", "output_error"))
MOST_CELLS = 100_000  # module types times layer numbers
LONGEST, NARROW = 44, 28  # characters of a module type beside the axis, and under it


@dataclass(frozen=True)
class Cell:
    """The layers of one module type with one layer number: one, or a layer's experts."""

    kind: str
    number: int | None
    rows: tuple[LayerRow, ...]

    @property
    def title(self) -> str:
        if len(self.rows) == 1:
            return self.rows[0].name
        where = "without a layer number" if self.number is None else f"in layer {self.number}"
        return f"{len(self.rows)} x {self.kind} {where}"

    @property
    def bits(self) -> str:
        return bits_words(self.rows)


@dataclass(frozen=True)
class Grid:
    """A report's layers by module type, in model order, and layer number; those without a number come last."""

    rows: tuple[LayerRow, ...]

    @cached_property
    def cells(self) -> dict[tuple[str, int | None], Cell]:
        groups: dict[tuple[str, int | None], list[LayerRow]] = {}
        for place, row in zip(places([row.name for row in self.rows]), self.rows, strict=True):
            groups.setdefault(place, []).append(row)
        across, down = len({number for _, number in groups}), len({kind for kind, _ in groups})
        if across * down > MOST_CELLS:
            raise ReportError(
                f"the report has {down} module types and {across} layer numbers, too many to be drawn; "
                "is it one of qinit?"
            )
        return {(kind, number): Cell(kind, number, tuple(rows)) for (kind, number), rows in groups.items()}

    @cached_property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _ in self.cells))

    @cached_property
    def numbers(self) -> list[int | None]:
        numbers = {number for _, number in self.cells}
        unnumbered: list[int | None] = [None] if None in numbers else []
        return sorted(number for number in numbers if number is not None) + unnumbered

    @cached_property
    def columns(self) -> list[str]:
        return ["none" if number is None else str(number) for number in self.numbers]

    def of_kind(self, kind: str) -> list[Cell]:
        return [self.cells[kind, number] for number in self.numbers if (kind, number) in self.cells]


@dataclass(frozen=True)
class Front:
    """Where a run's allocation lies: (bits per weight, nats over full precision) of each point."""

    how: str
    metric: str
    front: list[tuple[float, float]]
    uniform: list[tuple[float, float]]
    chosen: list[tuple[float, float]]
    measured: list[tuple[float, float]]
    texts: list[str]

    @property
    def series(self) -> list[tuple[str, list[tuple[float, float]], list[str]]]:
        """Name, points and, for the hover, what each point is."""
        every = [
            ("one width for all layers", self.uniform, ["one width for all layers"] * len(self.uniform)),
            ("Pareto front, predicted", self.front, ["on the front, predicted"] * len(self.front)),
            ("this run, predicted", self.chosen, ["this run, predicted"]),
            ("this run, measured", self.measured, [f"this run, measured on {text}" for text in self.texts]),
        ]
        return [one for one in every if one[1]]

    @property
    def log(self) -> bool:
        nats = [nats for _, points, _ in self.series for _, nats in points]
        return min(nats) > 0 and max(nats) > 20 * min(nats)


def evaluations(report: Report) -> list[tuple[str, float, float | None]]:
    """Return each evaluation's text, perplexity and excess over full precision in nats, where that is known."""
    found = []
    try:
        for one in report.totals.get("evaluations") or []:
            reference = one.get("reference_perplexity")
            nats = math.log(finite(one["perplexity"]) / finite(reference)) if reference else None
            label = str(one["text"])
            if one.get("length") is not None:
                label += f", windows of {one['length']}"
            if one.get("stride") is not None:
                label += f", stride {one['stride']}"
            found.append((label, finite(one["perplexity"]), nats))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged("evaluations", error) from None
    return found


def pareto_front(report: Report) -> Front | None:
    """Return the points of a run's allocation; None for a run without, or by a rule that predicts nothing."""
    try:
        found = report.totals.get("allocation") or {}
        if not found.get("chosen"):
            return None
        front, uniform = (sorted((finite(x), finite(y)) for x, y in found.get(key, ())) for key in ("front", "uniform"))
        bits, nats = map(finite, found["chosen"])
        how, metric = str(found["allocation"]), str(found["metric"])
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged("allocation", error) from None
    measured = [(text, excess) for text, _, excess in evaluations(report) if excess is not None]
    points = [(bits, excess) for _, excess in measured]
    return Front(how, metric, front, uniform, [(bits, nats)], points, [text for text, _ in measured])


def bits_words(rows: Sequence[LayerRow]) -> str:
    """Say the rows' widths: `2`, `2 to 4, mean 2.67`, `kept`."""
    widths, mean = sorted({row.bits for row in rows if row.bits is not None}), mean_bits(rows)
    kept = sum(row.bits is None for row in rows)
    if mean is None:
        return "kept"
    words = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}, mean {mean:.2f}"
    return f"{words} (+ {kept} kept)" if kept else words


def heading(report: Report, length: int = 200) -> str:
    """Name the run: model (in at most `length` characters), width, rank, method."""
    unpacked = report.recipe.get("format") == "dense"
    bits = report.totals.get("grid_bits_per_weight" if unpacked else "bits_per_weight")
    where = "on the grid" if unpacked else "as stored"
    words = [f"{bits:.3f} bits per weight {where}"] if isinstance(bits, int | float) else []
    words += [f"rank {report.recipe['rank']}"] if "rank" in report.recipe else []
    return f"{short(report.model, length)}: {', '.join(filter(None, [*words, report.method]))}"


def summary(report: Report) -> dict[str, str]:
    """Return a run's totals in words."""
    totals, rows = report.totals, report.layers
    kept = sum(row.kept is not None for row in rows)
    words = {"layers": f"{len(rows) - kept}" + (f" (+ {kept} kept)" if kept else ""), "bits": bits_words(rows)}
    words |= weighed(report)
    if "bits_per_weight" in totals:
        words["bits per weight"] = f"{totals['bits_per_weight']:.3f} as stored"
        grid = totals.get("grid_bits_per_weight", totals["bits_per_weight"])
        words["bits per weight"] += f", {grid:.3f} on the grid" if grid != totals["bits_per_weight"] else ""
    words |= checked(report)
    for name, start, end in (("relative error", *PANELS[0][1:]), ("of the outputs", *PANELS[1][1:])):
        before, after = average(rows, start), average(rows, end)
        if before is not None and after is not None:
            words[name] = f"{before:.4f} base alone -> {after:.4f} with the adapter"
    words |= measured_on(report)
    front = pareto_front(report)
    if front is not None:
        bits, nats = front.chosen[0]
        words["allocation"] = f"{front.how}: {bits:.3f} bits per weight, {nats_words(nats)} predicted"
    elif totals.get("allocation"):
        words["allocation"] = f"{totals['allocation'].get('allocation')}: {totals['allocation'].get('metric')}"
    for text, perplexity, excess in evaluations(report):
        words[f"perplexity on {text}"] = f"{perplexity:.3f}" + ("" if excess is None else f", {nats_words(excess)}")
    return words


def weighed(report: Report) -> dict[str, str]:
    """Return how much of the model is quantized and what the largest part is that is not, in words; nothing for runs by
    an older qinit, which do not say."""
    totals = report.totals
    try:
        if "left" not in totals:
            return {}
        return weight_words(totals["quantized_weights"], totals["weights"], totals["left"], report.done)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise damaged("left", error) from None


def checked(report: Report) -> dict[str, str]:
    """Return what the run was measured to be at its end, in words; nothing for one without."""
    try:
        found = report.totals.get("check")
        return {} if found is None else check_words(found)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise damaged("check", error) from None


def measured_on(report: Report) -> dict[str, str]:
    """Return the text that the run was measured on, and each polish, in words; nothing for one without."""
    calibration = report.totals.get("calibration") or {}
    try:
        words = {"calibrated on": str(calibration["text"])} if "text" in calibration else {}
        last = calibration.get("polish")
        polishes = [*(last.get("earlier") or []), last] if last else []
        for number, polish in enumerate(polishes, 1):
            words["polish" if len(polishes) == 1 else f"polish {number}"] = _polish_words(polish)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged("calibration", error) from None
    return words


def _polish_words(polish: dict[str, Any]) -> str:
    words = f"{polish['steps']} steps"
    words += f" on {polish['tokens']} tokens of {polish['text']}" if {"tokens", "text"} <= polish.keys() else ""
    if not polish["kept"]:
        return f"{words}; nothing gained"
    words += f"; held-out loss {polish['held_out_before']:.4f} -> {polish['held_out_after']:.4f}"
    kl = polish.get("kl")  # of a run that was measured before it was polished
    return words + (f"; KL from the original {kl['before']:.4f} -> {kl['after']:.4f} nats per token" if kl else "")


def nats_words(nats: float) -> str:
    """Say an excess in nats and as the factor on the perplexity."""
    return f"{nats:+.4f} nats (perplexity x {math.exp(min(nats, 700)):.4g})"


def short(name: str, length: int = LONGEST) -> str:
    """Return a name on one line, its middle left out where it is long."""
    name = " ".join(name.split())
    half = (length - 3) // 2
    return name if len(name) <= length else f"{name[:half]}...{name[-half:]}"


def finite(value: Any) -> float:
    number = float(value)
    if not abs(number) < 1e30:
        raise ValueError(f"{value!r} is no number to draw")
    return number


def damaged(key: str, error: Exception) -> ReportError:
    return ReportError(
        f"totals.{key} of the report is not what qinit writes ({type(error).__name__}: {error}); run `qinit eqft` again"
    )
