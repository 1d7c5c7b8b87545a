"""A training as one HTML page: ranks, trained layers and spike rates by layer over time. It loads nothing."""

from __future__ import annotations

from html import escape
from typing import Any

from qinit.report.pictures.html import CONFIG, HEAD
from qinit.report.pictures.layout import BLUE, missing, thinned
from qinit.snndlft.report import SnnReport


def page(report: SnnReport) -> str:
    """Draw a report as a page with hover. Raises ReportError without plotly."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise missing("plotly") from None
    steps = [moment["step"] for moment in report.moments]
    names = [row.name for row in report.layers]
    ranks = [[moment["ranks"][name] for moment in report.moments] for name in names]
    trained = [[int(name in moment["trained"]) for moment in report.moments] for name in names]
    rates = [[moment["rates"].get(name) for moment in report.moments] for name in names]
    grid = ("Ranks by layer: triplets in use", "rank %{z}", "viridis", ranks, True)
    figures = {"ranks": _heatmap(go, steps, names, *grid)}
    two = [[0, "#ececec"], [0.5, "#ececec"], [0.5, BLUE], [1, BLUE]]
    figures["trained"] = _heatmap(go, steps, names, "Layers that train", "%{z}", two, trained, False)
    if any(rate is not None for row in rates for rate in row):
        figures["rates"] = _heatmap(go, steps, names, "Spike rate by layer", "%{z:.4f}", "viridis", rates, True)
    figures["loss"] = _loss(go, steps, [moment["loss"] for moment in report.moments])
    rows = "\n".join(f"<tr><th>{escape(n)}</th><td>{escape(text)}</td></tr>" for n, text in summary(report).items())
    parts = [HEAD.format(title=escape(heading(report)), command=escape(report.command), rows=rows)]
    for index, (name, figure) in enumerate(figures.items()):
        figure.update_layout(
            template="plotly_white", font_family="system-ui, sans-serif", title_x=0, title_xref="paper"
        )
        parts.append(figure.to_html(include_plotlyjs=index == 0, full_html=False, div_id=name, config=CONFIG))
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    return "\n".join((*parts, "</body>", "</html>", ""))


def heading(report: SnnReport) -> str:
    kind = "spiking AdaLoRA" if report.config["spiking"] else "AdaLoRA"
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


def _heatmap(
    go: Any, steps: list[int], names: list[str], title: str, value: str, colours: Any, z: Any, bar: bool
) -> Any:
    hover = f"%{{y}}, step %{{x}}: {value}<extra></extra>"
    figure = go.Figure(go.Heatmap(x=steps, y=names, z=z, colorscale=colours, showscale=bar, hovertemplate=hover))
    if not bar:
        figure.update_traces(zmin=0, zmax=1)
    figure.update_xaxes(title="step", zeroline=False, showgrid=False)
    shown = [names[index] for index in thinned(len(names), 40)]
    figure.update_yaxes(autorange="reversed", automargin=True, tickvals=shown, showgrid=False)
    return figure.update_layout(title=title, height=140 + min(22 * max(len(names), 4), 900), margin={"t": 60, "b": 60})


def _loss(go: Any, steps: list[int], losses: list[float]) -> Any:
    figure = go.Figure(go.Scatter(x=steps, y=losses, mode="lines", line={"color": BLUE}))
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="nats, AdaLoRA's regularizer in it", automargin=True)
    return figure.update_layout(title="Loss", height=320, margin={"t": 60, "b": 60})
