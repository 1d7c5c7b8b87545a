"""`qinit methods`: the method table, every row with its choice on each axis; the published starts; PEFT's other
families."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qinit.families import Family
    from qinit.solver.methods import Method

# What A and B start as, and what of PEFT's LoraConfig it is.
STARTS_IN_WORDS = {
    "lora": ("A Kaiming-uniform, B zero", "init_lora_weights=True"),
    "rslora": ("as lora; s is lora_alpha / sqrt(rank)", "use_rslora=True"),
    "dora": ("as lora; and the lengths of the rows of W", "use_dora=True"),
    "pissa": ("leading singular triplets of W", 'init_lora_weights="pissa"; with --niter N "pissa_niter_N"'),
    "olora": ("first columns and rows of W = Q R", 'init_lora_weights="olora"'),
    "milora": ("last singular triplets of W", "none"),
    "corda": (
        "leading triplets of W C, C the inputs' E[x x']; with --corda-method kpm the last ones",
        'init_lora_weights="corda", corda_method="ipm" or "kpm"',
    ),
    "eva": ("A leading directions of the inputs, B zero", 'init_lora_weights="eva", rho=1'),
    "lora-ga": ("singular vectors of the loss's gradient", 'init_lora_weights="lora_ga"'),
}


def methods(
    json_output: Annotated[bool, typer.Option("--json", help="The table as JSON on stdout.")] = False,
) -> None:
    """List the methods that a recipe can name, and what each of them does: those that quantize, and the starts and
    other families of `qinit adapter`."""
    from qinit_cli.draw import Screen

    from qinit.families import FAMILIES
    from qinit.solver.methods import CALIBRATED, METHODS, STARTS

    rows = []
    for name, row in METHODS.items():
        rows.append(_described(row, "needed" if row.needs else "none"))
        if name in CALIBRATED:
            rows.append(_described(CALIBRATED[name], "where there is some"))
    starts = [started(row) for row in STARTS.values()]
    families = [_of_family(name, family) for name, family in FAMILIES.items()]
    if json_output:
        sys.stdout.write(json.dumps({"methods": rows, "starts": starts, "families": families}) + "\n")
    else:
        screen = Screen()
        screen.methods(rows)
        screen.starts(starts)
        screen.families(families)


def started(row: Method) -> dict[str, Any]:
    """Return what there is to say of a start: its axes, the bases that it takes, the argument of PEFT that it takes the
    place of, and the trainers that go on from it."""
    from qinit.formats import FORMATS, READERS
    from qinit.grids import GRIDS
    from qinit.solver.methods import SEARCHES
    from qinit.trainers import TRAINERS
    from qinit.trainers.base import Untrainable

    factors, peft = STARTS_IN_WORDS.get(row.name, ("", ""))
    packed = [each for each in (*FORMATS.values(), *READERS) if each.parts]
    return {
        "name": row.name,
        "calibration": "needed" if row.needs else "none",
        "factors": factors,
        "base": "W - s B A" if row.start == "low-rank" else "W",
        "bits": sorted({16, *(bits for grid in SEARCHES for bits in GRIDS[grid].bits)}),
        "grids": [row.grid, *SEARCHES],
        "packed_bases": [each.name for each in packed if row.start == "none" and not each.cannot_adapt(row.adapter)],
        "peft": peft,
        "trainers": [name for name, trainer in TRAINERS.items() if not isinstance(trainer, Untrainable)],
        "source": row.source,
    }


def _of_family(name: str, family: Family) -> dict[str, Any]:
    return {
        "name": name,
        "peft": family.config,
        "changes": "linear layers" if family.adapts else "what goes through the model",
        "rank": family.rank or None,
        "source": family.paper,
    }


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
