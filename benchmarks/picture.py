"""Draws the README's picture from model_zoo/results/compare-demo.json: `make picture`.

    python benchmarks/picture.py [OUT.svg]

Start and end of fine-tuning against bits per weight, for EQFT and its peers. The same result and matplotlib give the
same bytes. The background is white, so that it reads on a dark page too.
"""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "model_zoo" / "results" / "compare-demo.json"
PICTURE = ROOT / "docs" / "images" / "start-and-end.svg"

# Colours that the colour-blind can tell apart (Okabe and Ito), and a marker each.
METHODS = {
    "eqft": ("EQFT (qinit)", "#0072B2", "o"),
    "loftq": ("LoftQ", "#E69F00", "s"),
    "qpissa": ("QPiSSA", "#009E73", "^"),
    "qlora": ("QLoRA", "#D55E00", "D"),
}
CEILING = "lora"
TICKS = (5, 10, 15, 20, 30, 50, 90, 150, 300, 900)
STYLE = {
    "svg.hashsalt": "qinit",
    "svg.fonttype": "none",  # text stays text: smaller, and found by a search
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
}


def series(result: dict[str, Any]) -> dict[str, list[tuple[float, float, float, float]]]:
    """Return for each method (bits per weight, start, end, spread of the end) on the first text, by bits."""
    text = result["texts"][0]["name"]
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in (CEILING, *METHODS)}
    for row in result["rows"]:
        if row["method"] in found:
            end = row["end"][text]
            point = (row["bits_per_weight"], row["start"][text], end["mean"], end["spread"])
            found[row["method"]].append(point)
    return {name: sorted(points) for name, points in found.items()}


def described(result: dict[str, Any]) -> str:
    """Return the picture's numbers in words; they are in the file, so that a test can tell whether it is current."""
    lines = [
        f"{name}, {bits:.3f} bits per weight: {start:.3f} -> {end:.3f} ± {spread:.3f}"
        for name, points in series(result).items()
        for bits, start, end, spread in points
    ]
    return "; ".join(lines)


def draw(result: dict[str, Any]) -> bytes:
    """Return the picture as SVG."""
    points = series(result)
    ((_, full, ceiling, _),) = points[CEILING]
    text, training = result["texts"][0]["name"], result["training"]
    with plt.rc_context(STYLE):
        figure, (start, end) = plt.subplots(1, 2, figsize=(6.5, 4.0), layout="constrained")
        for name, (label, colour, marker) in METHODS.items():
            bits, starts, ends, spreads = zip(*points[name], strict=True)
            line = {"color": colour, "marker": marker, "linewidth": 2, "markersize": 7, "zorder": 3}
            start.plot(bits, starts, label=label, **line)
            end.errorbar(bits, ends, spreads, capsize=3, elinewidth=1.2, **line)
        for axes, value, words in ((start, full, "full precision"), (end, ceiling, "16-bit LoRA")):
            axes.axhline(value, color="#444444", linestyle="--", linewidth=1.2)
            axes.annotate(
                *(words, (0.02, value)), xycoords=("axes fraction", "data"), xytext=(0, -4),
                textcoords="offset points", ha="left", va="top", color="#444444", fontsize=11,
            )  # fmt: skip
            axes.set_xlabel("bits per weight")
            axes.set_xticks([2.5, 3.5, 4.5])
        start.set_yscale("log")
        start.set_ylim(0.83 * full, 1.17 * max(value for found in points.values() for _, value, _, _ in found))
        low, high = start.get_ylim()
        ticks = [tick for tick in TICKS if low < tick < high]
        start.set_yticks(ticks, [str(tick) for tick in ticks])
        start.minorticks_off()
        start.set_title("Start (log scale)", fontsize=13)
        start.set_ylabel(f"perplexity on {text}")
        end.set_title(f"After the same {training['steps']} steps", fontsize=13)
        end.margins(y=0.08)
        end.set_ylim(bottom=0.94 * ceiling)
        figure.legend(loc="outside upper center", ncols=4, frameon=False, handlelength=1.4, columnspacing=1.2)
        file = BytesIO()
        words = {"Description": described(result), "Date": None, "Creator": None}
        figure.savefig(file, format="svg", facecolor="white", metadata=words)
        plt.close(figure)
    return "\n".join(line.rstrip() for line in file.getvalue().decode().splitlines()).encode() + b"\n"


def main() -> None:
    out = Path(sys.argv[1]) if sys.argv[1:] else PICTURE
    out.write_bytes(draw(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
