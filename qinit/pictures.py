"""A report as pictures: one PNG, and one HTML page with hover that holds all it needs and loads nothing."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from qinit.errors import OutputError, ReportError
from qinit.report import LayerRow, Report, average, mean_bits, places

PNG_NAME, PAGE_NAME = "report.png", "report.html"
INSTALL = 'pip install "qinit[report]"'
NO_FRONT = "no losses were predicted in this run, so there is no Pareto front"

# Okabe and Ito's colours, which the colour-blind tell apart; marker shapes differ as well.
BLUE, VERMILLION, GREEN, ORANGE, GREY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#8a8a8a"
KEPT = "#dcdcdc"
WIDTHS = "viridis"
PANELS = (("weight", "error_start", "error"), ("output", "output_error_start", "output_error"))
LABELLED, CROWDED = 48, 400  # more columns get no widths written in, more layers no lines between their dots
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
            nats = math.log(_finite(one["perplexity"]) / _finite(reference)) if reference else None
            label = str(one["text"])
            if one.get("length") is not None:
                label += f", windows of {one['length']}"
            if one.get("stride") is not None:
                label += f", stride {one['stride']}"
            found.append((label, _finite(one["perplexity"]), nats))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged("evaluations", error) from None
    return found


def pareto_front(report: Report) -> Front | None:
    """Return the points of a run's allocation; None for a run without, or by a rule that predicts nothing."""
    try:
        found = report.totals.get("allocation") or {}
        if not found.get("chosen"):
            return None
        front, uniform = (
            sorted((_finite(x), _finite(y)) for x, y in found.get(key, ())) for key in ("front", "uniform")
        )
        bits, nats = map(_finite, found["chosen"])
        how, metric = str(found["allocation"]), str(found["metric"])
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged("allocation", error) from None
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
    return f"{_short(report.model, length)}: {', '.join([*words, str(report.recipe.get('method', ''))]).rstrip(', ')}"


def write_pictures(report: Report, directory: Path) -> tuple[Path, Path]:
    """Write report.png and report.html into a directory, each under a temporary name first; returns their paths."""
    first, second = write_files(directory, {PNG_NAME: png(report), PAGE_NAME: page(report).encode()})
    return first, second


def write_files(directory: Path, contents: dict[str, bytes]) -> list[Path]:
    """Write files into a directory, each under a temporary name first; returns their paths. Raises OutputError."""
    partial = directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial = directory / f".{name}.partial"
            try:
                partial.write_bytes(content)
                partial.replace(directory / name)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot be written ({error.strerror}: {partial.name}); choose another place with --out"
        ) from None
    return [directory / name for name in contents]


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
    heights += [4.1 if _steep(_spans(grid, panel[2])) else 3.1 for panel in panels]
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

    low, high = _range(grid)
    colours = colormaps[WIDTHS]
    kept, widths = _matrix(grid, kept=True), _matrix(grid, kept=False)
    axis.pcolormesh(kept, cmap=ListedColormap([KEPT]), edgecolors="white", linewidth=_gap(grid))
    mesh = axis.pcolormesh(widths, cmap=colours, vmin=low, vmax=high, edgecolors="white", linewidth=_gap(grid))
    if any(value == value for line in widths for value in line):
        bar = figure.colorbar(mesh, ax=axis, pad=0.01, fraction=0.03, label="bits")
        bar.set_ticks([math.log2(bits) for bits in _widths(grid)], labels=_widths(grid))
        bar.minorticks_off()
    if len(grid.columns) <= LABELLED:
        for y, line in enumerate(_labels(grid)):
            for x, text in enumerate(line):
                value = widths[y][x]
                dark = value == value and (value - low) / (high - low) < 0.6
                colour = "white" if dark else "black"
                axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color=colour)
    axis.set_ylim(len(grid.kinds), 0)
    shown = _numbers_shown(grid)
    axis.set_xticks([x + 0.5 for x in shown], [grid.columns[x] for x in shown], fontsize=8)
    shown = _thinned(len(grid.kinds), 220)
    names = [_short(grid.kinds[y]) for y in shown]
    axis.set_yticks([y + 0.5 for y in shown], names, fontsize=8, parse_math=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("layer number")
    axis.set_ylabel("module type")
    axis.set_title(_bits_title(grid), loc="left", fontsize=11)


def _png_errors(axis: Any, grid: Grid, panel: tuple[str, str, str]) -> None:
    (what, start, end), spans = panel, _spans(grid, panel[2])
    for field, name, colour, face in (
        (start, "base alone", VERMILLION, "white"),
        (end, "with the adapter", BLUE, BLUE),
    ):
        for index, (kind, left) in enumerate(spans):
            cells = grid.of_kind(kind)
            values = [average(cell.rows, field) for cell in cells]
            heights = [math.nan if value is None else value for value in values]
            label = None if index else name
            style = {"marker": "o", "markerfacecolor": face, "markersize": _marker(grid), "linewidth": 1.1}
            style |= {"linestyle": "none"} if len(grid.cells) > CROWDED else {}
            axis.plot(range(left, left + len(cells)), heights, color=colour, label=label, **style)
    edges = [left - (1 + _space(grid)) / 2 for _, left in spans[1:]]
    if len(edges) <= 60:
        for edge in edges:
            axis.axvline(edge, color=KEPT, linewidth=0.8, zorder=0)
    shown = _thinned(len(spans))
    centres = [left + (len(grid.of_kind(kind)) - 1) / 2 for kind, left in spans]
    labels = [_short(spans[index][0], NARROW) for index in shown]
    steep = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if _steep(spans) else {}
    axis.set_xticks([centres[index] for index in shown], labels, fontsize=8, parse_math=False, **steep)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-1, spans[-1][1] + len(grid.of_kind(spans[-1][0])))
    axis.set_ylim(bottom=0)
    axis.set_xlabel(_errors_axis(grid))
    axis.set_ylabel(_error_unit(what))
    axis.set_title(_errors_title(what), loc="left", fontsize=11)
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
    axis.set_title(_front_title(front), loc="left", fontsize=11, parse_math=False)
    clean(axis)
    axis.legend(frameon=False, fontsize=9)


def clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#ececec")
    axis.set_axisbelow(True)


# No button that sends the chart to a server or selects points, and no address to send it to.
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"],
}
HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.35em; overflow-wrap: anywhere; }}
code {{ background: #f2f2f2; padding: .1em .3em; overflow-wrap: anywhere; }}
th {{ text-align: left; font-weight: normal; color: #666; padding: 0 2em 0 0; vertical-align: top; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p><code>{command}</code></p>
<table>
{rows}
</table>
"""


def page(report: Report) -> str:
    """Draw a report as one HTML page with hover. It loads nothing, and is not allowed to."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise missing("plotly") from None
    grid, front = Grid(report.layers), pareto_front(report)
    figures = {"bits": _page_bits(go, grid)}
    for panel in PANELS:
        if average(report.layers, panel[2]) is not None:
            figures[f"{panel[0]}-error"] = _page_errors(go, grid, panel)
    if front is not None:
        figures["pareto"] = _page_front(go, front)
    rows = [f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in summary(report).items()]
    parts = [HEAD.format(title=escape(heading(report)), command=escape(report.command), rows="\n".join(rows))]
    for index, (name, figure) in enumerate(figures.items()):
        figure.update_layout(
            template="plotly_white", font_family="system-ui, sans-serif", title_x=0, title_xref="paper"
        )
        parts.append(figure.to_html(include_plotlyjs=index == 0, full_html=False, div_id=name, config=CONFIG))
    parts += [f"<p>{escape(note)}</p>" for note in (*([] if front else [f"{NO_FRONT}."]), *report.notes)]
    return "\n".join((*parts, "</body>", "</html>", ""))


def summary(report: Report) -> dict[str, str]:
    """Return a run's totals in words."""
    totals, rows = report.totals, report.layers
    kept = sum(row.kept is not None for row in rows)
    words = {"layers": f"{len(rows) - kept}" + (f" (+ {kept} kept)" if kept else ""), "bits": bits_words(rows)}
    if "bits_per_weight" in totals:
        words["bits per weight"] = f"{totals['bits_per_weight']:.3f} as stored"
        grid = totals.get("grid_bits_per_weight", totals["bits_per_weight"])
        words["bits per weight"] += f", {grid:.3f} on the grid" if grid != totals["bits_per_weight"] else ""
    for name, start, end in (("relative error", *PANELS[0][1:]), ("of the outputs", *PANELS[1][1:])):
        before, after = average(rows, start), average(rows, end)
        if before is not None and after is not None:
            words[name] = f"{before:.4f} base alone -> {after:.4f} with the adapter"
    front = pareto_front(report)
    if front is not None:
        bits, nats = front.chosen[0]
        words["allocation"] = f"{front.how}: {bits:.3f} bits per weight, {_nats(nats)} predicted"
    elif totals.get("allocation"):
        words["allocation"] = f"{totals['allocation'].get('allocation')}: {totals['allocation'].get('metric')}"
    for text, perplexity, excess in evaluations(report):
        words[f"perplexity on {text}"] = f"{perplexity:.3f}" + ("" if excess is None else f", {_nats(excess)}")
    return words


def _page_bits(go: Any, grid: Grid) -> Any:
    low, high = _range(grid)
    across, down = list(range(len(grid.columns))), list(range(len(grid.kinds)))
    hover = [
        [_cell_hover(grid.cells[kind, number]) if (kind, number) in grid.cells else "" for number in grid.numbers]
        for kind in grid.kinds
    ]
    common = {
        "x": across,
        "y": down,
        "text": _labels(grid),
        "customdata": hover,
        "xgap": _gap(grid),
        "ygap": _gap(grid),
    }
    common |= {"hovertemplate": "%{customdata}<extra></extra>", "hoverongaps": False}
    if len(grid.columns) <= LABELLED:
        common |= {"texttemplate": "%{text}", "textfont_size": 10}
    bar = {"title": "bits", "thickness": 14, "lenmode": "pixels", "len": min(max(24 * len(down), 110), 250)}
    bar |= {"y": 1, "yanchor": "top"}
    bar |= {"tickvals": [math.log2(bits) for bits in _widths(grid)], "ticktext": [str(bits) for bits in _widths(grid)]}
    figure = go.Figure()
    flat = {"colorscale": [[0, KEPT], [1, KEPT]], "showscale": False}
    for kept, style in (
        (True, flat),
        (
            False,
            {"colorscale": WIDTHS, "zmin": low, "zmax": high, "colorbar": bar},
        ),
    ):
        values = [[None if value != value else value for value in line] for line in _matrix(grid, kept=kept)]
        if any(value is not None for line in values for value in line):
            figure.add_heatmap(z=values, **style, **common)
    shown = _numbers_shown(grid)
    figure.update_xaxes(
        title="layer number",
        tickvals=shown,
        ticktext=[grid.columns[x] for x in shown],
        range=[-0.5, len(across) - 0.5],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title={"text": "module type", "standoff": 12},
        tickvals=down,
        ticktext=[escape(_short(kind), quote=False) for kind in grid.kinds],
        range=[len(down) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        automargin=True,
    )
    inside = min(max(24 * len(down), 60), 6000)
    return figure.update_layout(title=_bits_title(grid), height=inside + 120, margin={"t": 60, "b": 60})


def _page_errors(go: Any, grid: Grid, panel: tuple[str, str, str]) -> Any:
    (what, start, end), spans = panel, _spans(grid, panel[2])
    figure = go.Figure()
    mode = "markers" if len(grid.cells) > CROWDED else "lines+markers"
    for field, name, colour, symbol in (
        (start, "base alone", VERMILLION, "circle-open"),
        (end, "with the adapter", BLUE, "circle"),
    ):
        x: list[int | None] = []
        y: list[float | None] = []
        hover = []
        for kind, left in spans:
            for offset, cell in enumerate(grid.of_kind(kind)):
                value = average(cell.rows, field)
                x.append(left + offset)
                y.append(value if value is not None and math.isfinite(value) else None)
                hover.append(_cell_hover(cell))
            x, y, hover = [*x, None], [*y, None], [*hover, ""]
        marker = {"color": colour, "symbol": symbol, "size": 1.6 * _marker(grid)}
        line = {"color": colour, "width": 1.2}
        template = "%{customdata}<extra></extra>"
        figure.add_scatter(
            x=x,
            y=y,
            name=name,
            mode=mode,
            marker=marker,
            line=line,
            customdata=hover,
            hovertemplate=template,
        )
    for _, left in spans[1:61]:
        figure.add_vline(left - (1 + _space(grid)) / 2, line={"color": KEPT, "width": 1}, layer="below")
    shown = _thinned(len(spans), 50)
    figure.update_xaxes(
        title=_errors_axis(grid),
        tickvals=[spans[index][1] + (len(grid.of_kind(spans[index][0])) - 1) / 2 for index in shown],
        ticktext=[escape(_short(spans[index][0], NARROW), quote=False) for index in shown],
        tickangle=-30 if _steep(spans) else 0,
        range=[-1, spans[-1][1] + len(grid.of_kind(spans[-1][0]))],
        showgrid=False,
        zeroline=False,
        automargin=True,
    )
    figure.update_yaxes(title=_error_unit(what), rangemode="tozero")
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    return figure.update_layout(title=_errors_title(what), height=400, legend=legend, margin={"t": 70, "b": 60})


def _page_front(go: Any, front: Front) -> Any:
    styles: dict[str, dict[str, Any]] = {
        "one width for all layers": {"mode": "markers", "marker": {"symbol": "square", "color": GREY, "size": 11}},
        "Pareto front, predicted": {"mode": "lines+markers", "marker": {"color": BLUE, "size": 6}},
        "this run, predicted": {"mode": "markers", "marker": {"symbol": "star", "color": VERMILLION, "size": 18}},
        "this run, measured": {"mode": "markers", "marker": {"symbol": "diamond", "color": GREEN, "size": 12}},
    }
    figure = go.Figure()
    for name, points, words in front.series:
        hover = [
            f"{escape(what, quote=False)}<br>{bits:.3f} bits per weight<br>{_nats(nats)}"
            for what, (bits, nats) in zip(words, points, strict=True)
        ]
        x, y = zip(*points, strict=True)
        figure.add_scatter(
            x=x, y=y, name=name, customdata=hover, hovertemplate="%{customdata}<extra></extra>", **styles[name]
        )
    figure.update_xaxes(title="bits per weight")
    figure.update_yaxes(title="nats over full precision", automargin=True)
    if front.log:
        figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    title = escape(_front_title(front), quote=False)
    legend = {"x": 0.99, "xanchor": "right", "y": 0.99, "yanchor": "top", "bgcolor": "rgba(255,255,255,0.8)"}
    return figure.update_layout(title=title, height=480, legend=legend, margin={"t": 60, "b": 60})


def _cell_hover(cell: Cell) -> str:
    lines = [escape(_short(cell.title, 100), quote=False)]
    if len(cell.rows) == 1:
        row = cell.rows[0]
        lines += [f"{row.shape[0]} x {row.shape[1]}, rank {row.rank}"]
        lines += [f"kept: {escape(row.kept, quote=False)}"] if row.kept else []
    if mean_bits(cell.rows) is not None:
        lines.append(f"bits: {cell.bits}")
    for what, start, end in PANELS:
        before, after = average(cell.rows, start), average(cell.rows, end)
        if before is not None and after is not None:
            lines.append(f"{what} error: {before:.4f} base alone, {after:.4f} with the adapter")
    return "<br>".join(lines)


def _bits_title(grid: Grid) -> str:
    kept = any(row.bits is None for row in grid.rows)
    several = any(len(cell.rows) > 1 for cell in grid.cells.values())
    words = ["Bits by layer and module type"]
    words += ["mean where a cell holds several layers"] if several else []
    words += ["grey: kept as it was"] if kept else []
    return "; ".join(words)


def _errors_title(what: str) -> str:
    return f"{what.capitalize()} error before and after the low rank"


def _error_unit(what: str) -> str:
    return f"error / norm of the {what}"


def _errors_axis(grid: Grid) -> str:
    return "module type, layers in order within each" if len(grid.columns) > 1 else "module type"


def _front_title(front: Front) -> str:
    return _short(f"Bits against loss, predicted by {front.metric}", 110)


def _nats(nats: float) -> str:
    """Say an excess in nats and as the factor on the perplexity."""
    return f"{nats:+.4f} nats (perplexity x {math.exp(min(nats, 700)):.4g})"


def _matrix(grid: Grid, *, kept: bool) -> list[list[float]]:
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


def _labels(grid: Grid) -> list[list[str]]:
    lines = []
    for kind in grid.kinds:
        cells = [grid.cells.get((kind, number)) for number in grid.numbers]
        means = [mean_bits(cell.rows) if cell else None for cell in cells]
        lines.append(["" if mean is None else f"{mean:.2g}" for mean in means])
    return lines


def _widths(grid: Grid) -> list[int]:
    return sorted({2, 3, 4, 8} | {row.bits for row in grid.rows if row.bits})


def _range(grid: Grid) -> tuple[float, float]:
    widths = _widths(grid)
    return math.log2(widths[0]), math.log2(widths[-1])


def _spans(grid: Grid, field: str) -> list[tuple[str, int]]:
    """Return where each module type with an error starts on the axis, with some space between them."""
    spans, left = [], 0
    for kind in grid.kinds:
        cells = grid.of_kind(kind)
        if any(average(cell.rows, field) is not None for cell in cells):
            spans.append((kind, left))
            left += len(cells) + _space(grid)
    return spans


def _steep(spans: list[tuple[str, int]]) -> bool:
    """Whether the names of the module types do not fit side by side."""
    shown = _thinned(len(spans))
    return len(shown) * max(len(_short(spans[index][0], NARROW)) for index in shown) > 140


def _space(grid: Grid) -> int:
    return 1 + len(grid.columns) // 20


def _marker(grid: Grid) -> float:
    return 4 if len(grid.cells) <= CROWDED else 1.8


def _gap(grid: Grid) -> float:
    return 1 if len(grid.columns) <= 100 else 0


def _thinned(count: int, most: int = 26) -> list[int]:
    """Return at most `most` of the first `count` numbers, a round step apart."""
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return list(range(0, count, next(step for step in steps if step * most >= count)))


def _numbers_shown(grid: Grid) -> list[int]:
    """Return the columns whose layer number is written; the one without a number always is."""
    last = len(grid.columns) - 1
    if grid.numbers[-1] is not None:
        return _thinned(last + 1)
    shown = _thinned(last)
    crowded = len(shown) > 1 and 2 * (last - shown[-1]) < shown[1]
    return [*(shown[:-1] if crowded else shown), last]


def _short(name: str, length: int = LONGEST) -> str:
    """Return a name on one line, its middle left out where it is long."""
    name = " ".join(name.split())
    half = (length - 3) // 2
    return name if len(name) <= length else f"{name[:half]}...{name[-half:]}"


def missing(package: str) -> ReportError:
    return ReportError(f"the pictures need {package}, which is not installed; {INSTALL}")


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) < 1e30:
        raise ValueError(f"{value!r} is no number to draw")
    return number


def _damaged(key: str, error: Exception) -> ReportError:
    return ReportError(
        f"totals.{key} of the report is not what qinit writes ({type(error).__name__}: {error}); run `qinit eqft` again"
    )
