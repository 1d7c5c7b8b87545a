"""`qinit merge --adapters`: several adapters of one base become one adapter."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qinit_cli.eqft import interruptible, typed

if TYPE_CHECKING:
    from qinit_cli.draw import Screen

    from qinit.report.combined import Combined


def merge_adapters(
    run: Path | None,
    out: Path,
    adapters: str,
    weights: str | None,
    combination: str | None,
    density: float | None,
    *,
    trust_remote_code: bool,
    json_output: bool,
    quiet: bool,
) -> None:
    """Combine the adapters and say what came of it."""
    from qinit_cli.draw import Screen

    from qinit.merge.combine import combine, plan_combine

    screen = Screen(quiet=quiet, to_stderr=json_output)
    places = [Path(each.strip()) for each in adapters.split(",") if each.strip()]
    plan = plan_combine(
        places, _numbers(weights), combination or "linear", density, run=run, trust_remote_code=trust_remote_code
    )
    for note in plan.origin.notes:
        screen.say(f"note: {note}")
    with interruptible(out):
        report = combine(plan, out, command=typed(sys.argv[1:]))
    _draw(screen, report, out)
    if json_output:
        sys.stdout.write(json.dumps({"directory": str(out.resolve()), **asdict(report)}) + "\n")


def _numbers(weights: str | None) -> list[float]:
    from qinit.errors import RecipeError

    try:
        return [float(each) for each in (weights or "").split(",") if each.strip()]
    except ValueError:
        raise RecipeError(f"--weights: expected numbers, as 0.7,0.3; found '{weights}'") from None


def _draw(screen: Screen, report: Combined, out: Path) -> None:
    from qinit_cli.draw import size

    what = "holds" if report.start is None else "training added"
    rows = [
        *((f"{part.weight:g} x {part.name}", f"{what} {report.added(part)}") for part in report.parts),
        ("start", "none: the adapters were taken whole" if report.start is None else "added once"),
        ("matrices", f"{report.matrices}, rank {report.rank}"),
        ("adapter on disk", size(report.bytes)),
        ("written to", str(out)),
    ]
    screen.say(f"{report.base}: {len(report.parts)} adapters combined, {report.how}")
    screen.table("", "", rows=rows)
