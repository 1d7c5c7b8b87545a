"""A report as one HTML page with hover that holds all it needs and loads nothing."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from qinit.report.averages import average, mean_bits
from qinit.report.pictures.contents import (
    NARROW,
    NO_FRONT,
    PANELS,
    Cell,
    Front,
    Grid,
    heading,
    nats_words,
    pareto_front,
    short,
    summary,
)
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


def _page_bits(go: Any, grid: Grid) -> Any:
    low, high = width_range(grid)
    across, down = list(range(len(grid.columns))), list(range(len(grid.kinds)))
    hover = [
        [_cell_hover(grid.cells[kind, number]) if (kind, number) in grid.cells else "" for number in grid.numbers]
        for kind in grid.kinds
    ]
    common = {
        "x": across,
        "y": down,
        "text": width_labels(grid),
        "customdata": hover,
        "xgap": cell_gap(grid),
        "ygap": cell_gap(grid),
    }
    common |= {"hovertemplate": "%{customdata}<extra></extra>", "hoverongaps": False}
    if len(grid.columns) <= LABELLED:
        common |= {"texttemplate": "%{text}", "textfont_size": 10}
    bar = {"title": "bits", "thickness": 14, "lenmode": "pixels", "len": min(max(24 * len(down), 110), 250)}
    bar |= {"y": 1, "yanchor": "top"}
    bar |= {
        "tickvals": [math.log2(bits) for bits in widths_of(grid)],
        "ticktext": [str(bits) for bits in widths_of(grid)],
    }
    figure = go.Figure()
    flat = {"colorscale": [[0, KEPT], [1, KEPT]], "showscale": False}
    for kept, style in (
        (True, flat),
        (
            False,
            {"colorscale": WIDTHS, "zmin": low, "zmax": high, "colorbar": bar},
        ),
    ):
        values = [[None if value != value else value for value in line] for line in width_matrix(grid, kept=kept)]
        if any(value is not None for line in values for value in line):
            figure.add_heatmap(z=values, **style, **common)
    shown = numbers_shown(grid)
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
        ticktext=[escape(short(kind), quote=False) for kind in grid.kinds],
        range=[len(down) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        automargin=True,
    )
    inside = min(max(24 * len(down), 60), 6000)
    return figure.update_layout(title=bits_title(grid), height=inside + 120, margin={"t": 60, "b": 60})


def _page_errors(go: Any, grid: Grid, panel: tuple[str, str, str]) -> Any:
    (what, start, end), spans = panel, spans_of(grid, panel[2])
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
        marker = {"color": colour, "symbol": symbol, "size": 1.6 * marker_size(grid)}
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
        figure.add_vline(left - (1 + space_between(grid)) / 2, line={"color": KEPT, "width": 1}, layer="below")
    shown = thinned(len(spans), 50)
    figure.update_xaxes(
        title=errors_axis(grid),
        tickvals=[spans[index][1] + (len(grid.of_kind(spans[index][0])) - 1) / 2 for index in shown],
        ticktext=[escape(short(spans[index][0], NARROW), quote=False) for index in shown],
        tickangle=-30 if steep(spans) else 0,
        range=[-1, spans[-1][1] + len(grid.of_kind(spans[-1][0]))],
        showgrid=False,
        zeroline=False,
        automargin=True,
    )
    figure.update_yaxes(title=error_unit(what), rangemode="tozero")
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    return figure.update_layout(title=errors_title(what), height=400, legend=legend, margin={"t": 70, "b": 60})


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
            f"{escape(what, quote=False)}<br>{bits:.3f} bits per weight<br>{nats_words(nats)}"
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
    title = escape(front_title(front), quote=False)
    legend = {"x": 0.99, "xanchor": "right", "y": 0.99, "yanchor": "top", "bgcolor": "rgba(255,255,255,0.8)"}
    return figure.update_layout(title=title, height=480, legend=legend, margin={"t": 60, "b": 60})


def _cell_hover(cell: Cell) -> str:
    lines = [escape(short(cell.title, 100), quote=False)]
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
