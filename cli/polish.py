"""`qinit polish`: train the adapters and the scales of a finished run on, towards the full-precision model."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from qinit_cli.eqft import interruptible, show_split, typed
from qinit_cli.hush import hush
from qinit_cli.options import DATA_PANEL, MODEL_PANEL, OUTPUT_PANEL, takes
from qinit_cli.push import quiet_hub
from qinit_cli.verify import WANTING


def _option(kind: Any, panel: str, text: str, *names: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel=panel, **more)]


@takes(
    *("check", "device", "json_output", "quiet", "debug", "token", "trust_remote_code"),
    directory=Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, which holds qinit.json.")],
    steps=_option(int | None, DATA_PANEL, "Steps of all adapters together.", show_default="100"),
    calibration=_option(
        str | None,
        DATA_PANEL,
        "The text: a text or JSONL file, self (text that the model writes), text (text that qinit brings), random "
        "(random tokens), or the id of a data set on the Hub.",
        metavar="SOURCE",
        show_default="the run's own; beside self, or where it has none, text",
    ),
    calibration_samples=_option(int | None, DATA_PANEL, "Pieces of text, at least.", show_default="the run's own"),
    calibration_length=_option(int | None, DATA_PANEL, "Tokens in each piece.", show_default="the run's own"),
    text_field=_option(str | None, DATA_PANEL, "The field that holds the text.", show_default="text"),
    seed=_option(int | None, DATA_PANEL, "Draws the text and its order.", show_default="the run's own"),
    model=_option(
        str | None,
        MODEL_PANEL,
        "What the run was made from, a directory or a Hub id.",
        metavar="MODEL",
        show_default="the one that its report names",
    ),
    revision=_option(
        str | None, MODEL_PANEL, "Branch, tag or commit of MODEL on the Hub.", show_default="the run's own"
    ),
    out=_option(
        Path | None,
        OUTPUT_PANEL,
        "Write the polished run there and leave RUN as it is.",
        metavar="DIR",
        show_default="RUN is replaced, at the end and in one step",
    ),
    overwrite=_option(
        bool, OUTPUT_PANEL, "Replace an earlier run in DIR, and what an unfinished one has left there.", "--overwrite"
    ),
)
def polish(**options: Any) -> None:
    """Polish a finished run further: train its adapters and scales together towards the full-precision model."""
    from qinit_cli.draw import Screen

    hush()
    from qinit.clock import Clock
    from qinit.machine import pick_device
    from qinit.planner.time import expected_polish
    from qinit.runner.again import check_place, plan_polish, polish_planned
    from qinit.runner.loadable import is_lost

    screen = Screen(quiet=options["quiet"], to_stderr=options["json_output"])
    quiet_hub(options["quiet"], options["debug"])
    directory, token = options["directory"], options["token"]
    names = ("calibration", "calibration_samples", "calibration_length", "text_field", "seed", "device")
    again = plan_polish(
        directory,
        model=options["model"],
        revision=options["revision"],
        token=token,
        trust_remote_code=options["trust_remote_code"],
        check=options["check"] is not False,
        **{name: options[name] for name in names},
        **({} if options["steps"] is None else {"steps": options["steps"]}),
    )
    out, overwrite = options["out"] or directory, options["overwrite"]
    check_place(again, out, overwrite)
    note = expected_polish(again.plan, pick_device(again.plan.recipe.device))
    events = polish_planned(again, out, overwrite=overwrite, command=typed(sys.argv[1:]), token=token)
    clock = Clock()
    with interruptible(out), clock if options["debug"] else nullcontext():
        report = screen.follow(again.plan, events, [note])
    if options["debug"]:
        show_split(clock.split())
    if options["json_output"]:
        gained = report is not again.before.report
        screen.json_report(report, out if gained else directory, gained=gained)
    if is_lost(report.notes):
        raise typer.Exit(WANTING)
