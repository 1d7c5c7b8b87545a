"""What the PNG and the page have in common: colours, titles, and where things stand."""

from __future__ import annotations

import math

from qinit.errors import ReportError
from qinit.report.averages import average, mean_bits
from qinit.report.pictures.contents import NARROW, Front, Grid, short

INSTALL = 'pip install "qinit[report]"'
# Okabe and Ito's colours, which the colour-blind tell apart; marker shapes differ as well.
BLUE, VERMILLION, GREEN, ORANGE, GREY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#8a8a8a"
KEPT = "#dcdcdc"
WIDTHS = "viridis"
LABELLED, CROWDED = 48, 400  # more columns get no widths written in, more layers no lines between their dots


def bits_title(grid: Grid) -> str:
    kept = any(row.bits is None for row in grid.rows)
    several = any(len(cell.rows) > 1 for cell in grid.cells.values())
    words = ["Bits by layer and module type"]
    words += ["mean where a cell holds several layers"] if several else []
    words += ["grey: kept as it was"] if kept else []
    return "; ".join(words)


def errors_title(what: str) -> str:
    return f"{what.capitalize()} error before and after the low rank"


def error_unit(what: str) -> str:
    return f"error / norm of the {what}"


def errors_axis(grid: Grid) -> str:
    return "module type, layers in order within each" if len(grid.columns) > 1 else "module type"


def front_title(front: Front) -> str:
    return short(f"Bits against loss, predicted by {front.metric}", 110)


def width_matrix(grid: Grid, *, kept: bool) -> list[list[float]]:
    """Return log2 of each cell's bits, so that 2, 3, 4 and 8 lie apart; or 0 for each cell that was kept."""
    lines = []
    for kind in grid.kinds:
        line = []
        for number in grid.numbers:
            cell = grid.cells.get((kind, number))
            bits = mean_bits(cell.rows) if cell else None
            shown = cell is not None and (bits is None) == kept
            line.append(math.log2(bits) if shown and bits else 0.0 if shown else math.nan)
        lines.append(line)
    return lines


def width_labels(grid: Grid) -> list[list[str]]:
    lines = []
    for kind in grid.kinds:
        cells = [grid.cells.get((kind, number)) for number in grid.numbers]
        means = [mean_bits(cell.rows) if cell else None for cell in cells]
        lines.append(["" if mean is None else f"{mean:.2g}" for mean in means])
    return lines


def widths_of(grid: Grid) -> list[int]:
    return sorted({2, 3, 4, 8} | {row.bits for row in grid.rows if row.bits})


def width_range(grid: Grid) -> tuple[float, float]:
    widths = widths_of(grid)
    return math.log2(widths[0]), math.log2(widths[-1])


def spans_of(grid: Grid, field: str) -> list[tuple[str, int]]:
    """Return where each module type with an error starts on the axis, with some space between them."""
    spans, left = [], 0
    for kind in grid.kinds:
        cells = grid.of_kind(kind)
        if any(average(cell.rows, field) is not None for cell in cells):
            spans.append((kind, left))
            left += len(cells) + space_between(grid)
    return spans


def steep(spans: list[tuple[str, int]]) -> bool:
    """Whether the names of the module types do not fit side by side."""
    shown = thinned(len(spans))
    return len(shown) * max(len(short(spans[index][0], NARROW)) for index in shown) > 140


def space_between(grid: Grid) -> int:
    return 1 + len(grid.columns) // 20


def marker_size(grid: Grid) -> float:
    return 4 if len(grid.cells) <= CROWDED else 1.8


def cell_gap(grid: Grid) -> float:
    return 1 if len(grid.columns) <= 100 else 0


def thinned(count: int, most: int = 26) -> list[int]:
    """Return at most `most` of the first `count` numbers, a round step apart."""
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return list(range(0, count, next(step for step in steps if step * most >= count)))


def numbers_shown(grid: Grid) -> list[int]:
    """Return the columns whose layer number is written; the one without a number always is."""
    last = len(grid.columns) - 1
    if grid.numbers[-1] is not None:
        return thinned(last + 1)
    shown = thinned(last)
    crowded = len(shown) > 1 and 2 * (last - shown[-1]) < shown[1]
    return [*(shown[:-1] if crowded else shown), last]


def missing(package: str) -> ReportError:
    return ReportError(f"the pictures need {package}, which is not installed; {INSTALL}")
