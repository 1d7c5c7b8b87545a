"""A comparison as a picture and as a page: where each method starts and ends at each width, text by text."""

from __future__ import annotations

import io
from dataclasses import dataclass
from html import escape
from typing import Any

from qinit.compare.comparison import CEILINGS
from qinit.compare.table import NAMES, failures, header, lines, sweep_header, sweep_lines, title
from qinit.report.pictures.html import CONFIG, HEAD
from qinit.report.pictures.layout import BLUE, GREEN, GREY, ORANGE, VERMILLION, missing
from qinit.report.pictures.raster import clean

# Okabe and Ito's, as in the report; shapes differ as well.
COLOURS = (BLUE, "#56b4e9", VERMILLION, ORANGE, GREEN, "#cc79a7", "#000000", GREY)
MARKERS = (("o", "circle"), ("D", "diamond"), ("s", "square"), ("^", "triangle-up"), ("v", "triangle-down"), ("X", "x"))
APART = 0.13  # between the methods of a width
LINES = {"lora": "dash", "full": "dot"}


@dataclass(frozen=True)
class Series:
    """One method's points in a panel: (x, perplexity, spread, hover)."""

    name: str
    number: int
    points: list[tuple[float, float, float, str]]


@dataclass(frozen=True)
class Panel:
    """Starts or ends on one text; `levels` are the ceilings' (method, name, perplexity)."""

    title: str
    widths: list[int]
    series: list[Series]
    levels: list[tuple[str, str, float]]


def panels(result: dict[str, Any]) -> list[Panel]:
    """Return what is drawn: for each text the starts and, after fine-tuning, the ends."""
    found = []
    for text in (text["name"] for text in result["texts"]):
        found.append(_panel(result, text, "start"))
        if result["training"]:
            found.append(_panel(result, text, "end"))
    return [panel for panel in found if panel.series or panel.levels]


def _panel(result: dict[str, Any], text: str, which: str) -> Panel:
    rows = result["rows"]
    quantized = [row for row in rows if row["method"] not in CEILINGS]
    widths = sorted({row["bits"] for row in quantized})
    methods = list(dict.fromkeys(row["method"] for row in quantized))
    series = []
    for number, method in enumerate(methods):
        points = []
        for row in quantized:
            value, spread = _value(row, text, which)
            if row["method"] == method and value is not None:
                x = widths.index(row["bits"]) + APART * (number - (len(methods) - 1) / 2)
                words = f"{method}, {row['bits']} bits ({row['bits_per_weight']:.3f} as stored)"
                points.append((x, value, spread, f"{words}: {value:.3f}" + (f" ± {spread:.3f}" if spread else "")))
        if points:
            series.append(Series(method, number, points))
    levels = []
    for row in rows:
        value, _ = _value(row, text, which)
        if row["method"] in CEILINGS and value is not None:
            name = NAMES[row["method"]] if which == "end" else "full precision"
            levels.append((row["method"], name, value))
    return Panel(
        f"{'Start' if which == 'start' else 'End'}, {text}", widths, series, levels[: 1 if which == "start" else None]
    )


def _value(row: dict[str, Any], text: str, which: str) -> tuple[float | None, float]:
    if which == "start":
        return (row["start"] or {}).get(text), 0.0
    end = (row["end"] or {}).get(text) or {}
    return end.get("mean"), end.get("spread") or 0.0


def png(result: dict[str, Any]) -> bytes:
    """Draw the comparison as one PNG. Raises ReportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib") from None
    drawn = panels(result)
    figure = Figure(figsize=(12, 3.6 * len(drawn) + 0.8), dpi=130, layout="constrained")
    figure.suptitle(title(result), fontsize=10, parse_math=False, wrap=True)
    axes = figure.subplots(max(1, len(drawn)), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, drawn, strict=False):
        for series in panel.series:
            x, y, spread, _ = zip(*series.points, strict=True)
            style = {"color": COLOURS[series.number % len(COLOURS)], "marker": MARKERS[series.number % len(MARKERS)][0]}
            axis.errorbar(x, y, yerr=spread, linestyle="none", capsize=3, label=series.name, **style)
        for method, name, value in panel.levels:
            dashes = "--" if LINES[method] == "dash" else ":"
            axis.axhline(value, label=f"{name}: {value:.3f}", linestyle=dashes, linewidth=1.1, color=GREY)
        axis.set_yscale("log")
        axis.set_xticks(range(len(panel.widths)), [f"{bits} bits" for bits in panel.widths])
        axis.set_xlim(-0.5, len(panel.widths) - 0.5)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.set_ylabel("perplexity")
        axis.set_title(panel.title, loc="left", fontsize=11, parse_math=False)
        clean(axis)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def page(result: dict[str, Any]) -> bytes:
    """Draw the comparison as one HTML page that loads nothing. Raises ReportError without plotly."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise missing("plotly") from None
    facts = {"what": title(result), "machine": f"{result['machine']['gpu'] or result['machine']['cpu']}"}
    facts |= {"versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items())}
    rows = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts.items())
    heading = f"{result['model']}: methods side by side"
    parts = [HEAD.format(title=escape(heading), command=escape(result["command"]), rows=rows)]
    for index, panel in enumerate(panels(result)):
        figure = _page_panel(go, panel)
        parts.append(
            figure.to_html(include_plotlyjs=index == 0, full_html=False, div_id=f"panel{index}", config=CONFIG)
        )
    parts.append(_html_table(header(result), lines(result)))
    parts += [f"<p>Failed: {escape(line)}</p>" for line in failures(result)]
    if result["training"]:
        parts += ["<h2>Learning rates</h2>", _html_table(sweep_header(result), sweep_lines(result))]
    return "\n".join((*parts, "</body>", "</html>", "")).encode()


def _page_panel(go: Any, panel: Panel) -> Any:
    figure = go.Figure()
    for series in panel.series:
        x, y, spread, words = zip(*series.points, strict=True)
        marker = {"color": COLOURS[series.number % len(COLOURS)], "symbol": MARKERS[series.number % len(MARKERS)][1]}
        figure.add_scatter(
            **{"x": x, "y": y, "mode": "markers", "name": escape(series.name), "marker": {**marker, "size": 10}},
            error_y={"type": "data", "array": spread, "visible": any(spread)},
            customdata=[escape(text, quote=False) for text in words],
            hovertemplate="%{customdata}<extra></extra>",
        )
    ends = [-0.5, len(panel.widths) - 0.5]
    for method, name, value in panel.levels:
        style = {"color": GREY, "dash": LINES[method], "width": 1.3}
        figure.add_scatter(
            x=ends, y=[value] * 2, mode="lines", name=f"{name}: {value:.3f}", line=style, hoverinfo="name"
        )
    ticks = {"tickvals": list(range(len(panel.widths))), "ticktext": [f"{bits} bits" for bits in panel.widths]}
    figure.update_xaxes(range=ends, zeroline=False, showgrid=False, **ticks)
    figure.update_yaxes(title="perplexity", type="log", automargin=True)
    return figure.update_layout(
        **{"title": escape(panel.title, quote=False), "height": 420, "template": "plotly_white"},
        **{"font_family": "system-ui, sans-serif", "title_x": 0, "title_xref": "paper"},
    )


def _html_table(names: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}\n</table>"
