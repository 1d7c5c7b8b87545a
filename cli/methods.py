"""`qinit methods`: the method table, every row with its choice on each axis."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qinit.solver.methods import Method


def methods(
    json_output: Annotated[bool, typer.Option("--json", help="The table as JSON on stdout.")] = False,
) -> None:
    """List the methods that a recipe can name, and what each of them does."""
    from qinit_cli.draw import Screen

    from qinit.solver.methods import CALIBRATED, METHODS

    rows = []
    for name, row in METHODS.items():
        rows.append(_described(row, "needed" if row.needs else "none"))
        if name in CALIBRATED:
            rows.append(_described(CALIBRATED[name], "where there is some"))
    if json_output:
        sys.stdout.write(json.dumps({"methods": rows}) + "\n")
    else:
        Screen().methods(rows)


def _described(row: Method, calibration: str) -> dict[str, Any]:
    from qinit.grids import GRIDS

    return {
        "name": row.name,
        "calibration": calibration,
        "grid": row.grid,
        "bits": list(GRIDS[row.grid].bits),
        "search": row.search,
        "rounding": row.rounding,
        "metric": row.metric,
        "schedule": _schedule(row),
        "source": row.source,
    }


def _schedule(row: Method) -> list[str]:
    """Say in words what happens in which order, and what of it is kept."""
    from qinit.solver.methods import LARGE_SHARE

    count = f"{row.iterations} round{'s' if row.iterations > 1 else ''}"
    if row.solver == "published" and row.start == "low-rank":
        count = f"at most {count}, until the error rises"
    words = ["MagR"] if row.magr else []
    if row.start == "none":
        words.append("quantize W, no low rank (plain LoRA start)")
    elif not row.refit:
        words.append("low rank of W first, quantize the rest, low rank kept")
    else:
        first = "part of the rank for W first" if row.preserve else "quantize first"
        if row.start == "either":
            where = "" if row.needs else "at 2 bits and "
            large = f"where A and B have at least 1/{1 / LARGE_SHARE:g} of the layer's weights"
            words.append(f"low rank first {where}{large}, else quantize first")
        else:
            words.append("low rank first" if row.start == "low-rank" else first)
        words.append(f"{count} (--iter)" if row.adjustable else count)
    if row.passes:
        words.append("coordinate descent on codes and scales")
    if row.relaxation != 1:
        words.append(f"over-relaxed by {row.relaxation:g}{' where low rank is first' if row.start == 'either' else ''}")
    if row.refit and row.iterations > 1:
        words.append("best round kept" if row.keep_best else "last round kept")
    if row.split != "balanced":
        words.append(f"singular values in {row.split}")
    if row.ridge:
        words.append(f"ridge {row.ridge:g}")
    return words
