"""A training as one HTML page: ranks, trained layers and spike rates by layer over time. It loads nothing."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from qinit.files.atomic import write_files
from qinit.files.manifest import refresh
from qinit.report.pictures.contents import short
from qinit.report.pictures.files import PAGE_NAME
from qinit.report.pictures.html import CONFIG, HEAD
from qinit.report.pictures.layout import BLUE, KEPT, missing, thinned
from qinit.snndlft.report import SnnReport

LONGEST = 40  # characters of a layer's name
LETTER = 6.6  # pixels
RIGHT = 150  # pixels for the colour bars: all panels end at the same step
TWO = [[0, KEPT], [0.5, KEPT], [0.5, BLUE], [1, BLUE]]


def page(report: SnnReport) -> str:
    """Draw a report as a page with hover: panels of the same width over the same steps. Raises ReportError without
    plotly."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise missing("plotly") from None
    names, moments = [row.name for row in report.layers], report.moments
    panels = _Panels(go, [moment.step for moment in moments], names)
    figures = {
        "ranks": panels.heatmap(
            "Ranks by layer: triplets in use",
            [[moment.ranks[name] for moment in moments] for name in names],
            {"colorscale": "viridis", "zmin": 0, "colorbar": {"title": "triplets"}},
            "%{z} triplets",
        ),
        "trained": panels.heatmap(
            "Layers that train",
            [[int(name in moment.trained) for moment in moments] for name in names],
            {
                **{"colorscale": TWO, "zmin": 0, "zmax": 1},
                **{"colorbar": {"tickvals": [0.25, 0.75], "ticktext": ["waits", "trains"], "title": "layer"}},
                "text": [["trains" if name in moment.trained else "waits" for moment in moments] for name in names],
            },
            "%{text}",
        ),
    }
    rates = [[moment.rates.get(name) for moment in moments] for name in names]
    if any(rate is not None for row in rates for rate in row):
        bar = {"title": "spikes for<br>each neuron<br>and time step"}
        options = {"colorscale": "viridis", "colorbar": bar}
        figures["rates"] = panels.heatmap("Spike rate by layer", rates, options, "%{z:.4f}")
    figures["loss"] = panels.line(
        "Loss: mean since the point before, with AdaLoRA's regularizer", [moment.loss for moment in moments], "nats"
    )
    rows = "\n".join(f"<tr><th>{escape(n)}</th><td>{escape(text)}</td></tr>" for n, text in summary(report).items())
    parts = [HEAD.format(title=escape(heading(report)), command=escape(report.command), rows=rows)]
    for index, (name, figure) in enumerate(figures.items()):
        parts.append(figure.to_html(include_plotlyjs=index == 0, full_html=False, div_id=name, config=CONFIG))
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    return "\n".join((*parts, "</body>", "</html>", ""))


def redraw(report: SnnReport, directory: Path, out: Path | None = None) -> Path:
    """Write the page of a training into its directory, or into `out`; returns its path. Raises ReportError and
    OutputError."""
    (path,) = write_files(out or directory, {PAGE_NAME: page(report).encode()})
    if path.parent.resolve() == directory.resolve():
        refresh(directory, [PAGE_NAME])
    return path


def heading(report: SnnReport) -> str:
    kind = "spiking AdaLoRA" if report.spiking else "AdaLoRA"
    return f"{report.model}: {kind}, layer-wise {report.config['layer_wise']}"


def summary(report: SnnReport) -> dict[str, str]:
    """Say the totals in words."""
    totals, training = report.totals, report.training
    words = {
        totals["metric"]: f"{totals['before']:.4f} before, {totals['after']:.4f} after {training['steps']} steps",
        "layers": f"{totals['layers_trained']} of {totals['layers']} train at the end",
        "trainable": f"{totals['trainable']:,} values in a step, {totals['trainable_in_use']:,} of them in triplets in "
        f"use; {totals['trainable_all_layers']:,} with all layers",
        "head": f"{totals['head']:,} values more, in every step",
        "ranks": f"{totals['ranks']} triplets in {totals['modules']} modules",
        "optimizer state": f"{totals['optimizer_bytes'] / 1e6:.2f} MB",
        "time": f"{totals['seconds_per_step']:.3f} s per step",
        "peak memory": f"{totals['peak_memory_bytes'] / 1e6:.0f} MB",
    }
    if "spike_rate" in totals:
        energy = totals["energy_per_token"]
        words["spike rate"] = f"{totals['spike_rate']:.3f} of the neurons and time steps"
        words["energy, estimated"] = (
            f"{energy['spiking'] * 1e9:.1f} nJ a token for the adapters, {energy['dense'] * 1e9:.1f} nJ without spikes "
            "(Horowitz, ISSCC 2014, 45 nm)"
        )
    return words if totals["head"] else {key: value for key, value in words.items() if key != "head"}


class _Panels:
    """Draws over the same steps, one panel under the other: all begin and end at the same place."""

    def __init__(self, go: Any, steps: list[int], names: list[str]) -> None:
        self._go, self._steps = go, steps
        self._names = [escape(name, quote=False) for name in names]
        self._shown = thinned(len(names), 40)
        self._labels = [escape(short(names[index], LONGEST), quote=False) for index in self._shown]
        self._left = 60 + LETTER * max(len(short(name, LONGEST)) for name in names)
        half = 0.5 * (steps[-1] - steps[-2]) if len(steps) > 1 else 0.5
        self._range = [steps[0] - half, steps[-1] + half]

    def heatmap(self, title: str, values: Any, options: dict[str, Any], hover: str) -> Any:
        """Draw a value [layer][moment]; `hover` is what is said of one."""
        words = f"%{{y}}, step %{{x}}: {hover}<extra></extra>"
        figure = self._go.Figure(
            self._go.Heatmap(x=self._steps, y=self._names, z=values, hovertemplate=words, **options)
        )
        ticks = [self._names[index] for index in self._shown]
        figure.update_yaxes(title="layer", autorange="reversed", tickvals=ticks, ticktext=self._labels, showgrid=False)
        return self._laid_out(figure, title, 150 + min(22 * max(len(self._names), 5), 900))

    def line(self, title: str, values: list[float], unit: str) -> Any:
        """Draw a value over the moments."""
        mode = "lines" if len(values) > 1 else "markers"
        figure = self._go.Figure(self._go.Scatter(x=self._steps, y=values, mode=mode, line={"color": BLUE}))
        figure.update_yaxes(title=unit)
        return self._laid_out(figure, title, 320)

    def _laid_out(self, figure: Any, title: str, height: int) -> Any:
        figure.update_xaxes(title="step", range=self._range, zeroline=False, showgrid=False)
        margin = {"t": 60, "b": 60, "l": self._left, "r": RIGHT, "autoexpand": False}
        look = {"template": "plotly_white", "font_family": "system-ui, sans-serif", "title_x": 0}
        return figure.update_layout(title=title, title_xref="paper", height=height, margin=margin, **look)
