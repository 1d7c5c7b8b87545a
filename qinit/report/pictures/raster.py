"""A report as one PNG."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

from qinit.report.averages import average
from qinit.report.pictures.contents import NARROW, PANELS, Front, Grid, heading, pareto_front, short
from qinit.report.pictures.layout import (
    BLUE,
    CROWDED,
    GREEN,
    GREY,
    KEPT,
    LABELLED,
    VERMILLION,
    WIDTHS,
    bits_title,
    cell_gap,
    error_unit,
    errors_axis,
    errors_title,
    front_title,
    marker_size,
    missing,
    numbers_shown,
    space_between,
    spans_of,
    steep,
    thinned,
    width_labels,
    width_matrix,
    width_range,
    widths_of,
)
from qinit.report.report import Report


def png(report: Report) -> bytes:
    """Draw a report as one PNG."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise missing("matplotlib") from None
    grid, front = Grid(report.layers), pareto_front(report)
    panels = [panel for panel in PANELS if average(report.layers, panel[2]) is not None]
    height = min(max(0.3 * len(grid.kinds), 0.6), 60)
    heights = [height + 0.9]
    heights += [4.1 if steep(spans_of(grid, panel[2])) else 3.1 for panel in panels]
    heights += [3.9] * (front is not None)
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1)
    figure = Figure(figsize=(12, sum(heights) + 0.5), dpi=130, layout=layout)
    figure.suptitle(heading(report, 48), fontsize=12.5, fontweight="bold", parse_math=False)
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _png_bits(figure, axes[0], grid)
    for axis, panel in zip(axes[1:], panels, strict=False):
        _png_errors(axis, grid, panel)
    if front is not None:
        _png_front(axes[-1], front)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _png_bits(figure: Any, axis: Any, grid: Grid) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    low, high = width_range(grid)
    colours = colormaps[WIDTHS]
    kept, widths = width_matrix(grid, kept=True), width_matrix(grid, kept=False)
    axis.pcolormesh(kept, cmap=ListedColormap([KEPT]), edgecolors="white", linewidth=cell_gap(grid))
    mesh = axis.pcolormesh(widths, cmap=colours, vmin=low, vmax=high, edgecolors="white", linewidth=cell_gap(grid))
    if any(value == value for line in widths for value in line):
        bar = figure.colorbar(mesh, ax=axis, pad=0.01, fraction=0.03, label="bits")
        bar.set_ticks([math.log2(bits) for bits in widths_of(grid)], labels=widths_of(grid))
        bar.minorticks_off()
    if len(grid.columns) <= LABELLED:
        for y, line in enumerate(width_labels(grid)):
            for x, text in enumerate(line):
                value = widths[y][x]
                dark = value == value and (value - low) / (high - low) < 0.6
                colour = "white" if dark else "black"
                axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color=colour)
    axis.set_ylim(len(grid.kinds), 0)
    shown = numbers_shown(grid)
    axis.set_xticks([x + 0.5 for x in shown], [grid.columns[x] for x in shown], fontsize=8)
    shown = thinned(len(grid.kinds), 220)
    names = [short(grid.kinds[y]) for y in shown]
    axis.set_yticks([y + 0.5 for y in shown], names, fontsize=8, parse_math=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("layer number")
    axis.set_ylabel("module type")
    axis.set_title(bits_title(grid), loc="left", fontsize=11)


def _png_errors(axis: Any, grid: Grid, panel: tuple[str, str, str]) -> None:
    (what, start, end), spans = panel, spans_of(grid, panel[2])
    for field, name, colour, face in (
        (start, "base alone", VERMILLION, "white"),
        (end, "with the adapter", BLUE, BLUE),
    ):
        for index, (kind, left) in enumerate(spans):
            cells = grid.of_kind(kind)
            values = [average(cell.rows, field) for cell in cells]
            heights = [math.nan if value is None else value for value in values]
            label = None if index else name
            style = {"marker": "o", "markerfacecolor": face, "markersize": marker_size(grid), "linewidth": 1.1}
            style |= {"linestyle": "none"} if len(grid.cells) > CROWDED else {}
            axis.plot(range(left, left + len(cells)), heights, color=colour, label=label, **style)
    edges = [left - (1 + space_between(grid)) / 2 for _, left in spans[1:]]
    if len(edges) <= 60:
        for edge in edges:
            axis.axvline(edge, color=KEPT, linewidth=0.8, zorder=0)
    shown = thinned(len(spans))
    centres = [left + (len(grid.of_kind(kind)) - 1) / 2 for kind, left in spans]
    labels = [short(spans[index][0], NARROW) for index in shown]
    slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if steep(spans) else {}
    axis.set_xticks([centres[index] for index in shown], labels, fontsize=8, parse_math=False, **slant)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-1, spans[-1][1] + len(grid.of_kind(spans[-1][0])))
    axis.set_ylim(bottom=0)
    axis.set_xlabel(errors_axis(grid))
    axis.set_ylabel(error_unit(what))
    axis.set_title(errors_title(what), loc="left", fontsize=11)
    clean(axis)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)


def _png_front(axis: Any, front: Front) -> None:
    styles: dict[str, dict[str, Any]] = {
        "one width for all layers": {"marker": "s", "color": GREY, "linestyle": "none", "markersize": 8},
        "Pareto front, predicted": {"marker": ".", "color": BLUE, "markersize": 7},
        "this run, predicted": {"marker": "*", "color": VERMILLION, "linestyle": "none", "markersize": 17, "zorder": 4},
        "this run, measured": {"marker": "D", "color": GREEN, "linestyle": "none", "markersize": 7, "zorder": 5},
    }
    for name, points, _ in front.series:
        axis.plot(*zip(*points, strict=True), label=name, **styles[name])
    if front.log:
        axis.set_yscale("log")
    axis.set_xlabel("bits per weight")
    axis.set_ylabel("nats over full precision")
    axis.set_title(front_title(front), loc="left", fontsize=11, parse_math=False)
    clean(axis)
    axis.legend(frameon=False, fontsize=9)


def clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#ececec")
    axis.set_axisbelow(True)
