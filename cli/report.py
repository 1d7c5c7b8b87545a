"""`qinit report`: a run's report as a table, a picture and a page."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from qinit_cli.options import DEBUG, RUN

if TYPE_CHECKING:
    from qinit_cli.draw import Screen


def report(
    directory: RUN,
    out: Annotated[Path | None, typer.Option(help="Where the pictures go.", show_default="DIR")] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="The paths and the totals as JSON on stdout, nothing else.")
    ] = False,
    debug: DEBUG = False,
) -> None:
    """Draw a run: bits by layer, the error before and after the low rank, and bits against loss. Of what `qinit
    snndlft` wrote: ranks, trained layers and spike rates by layer over time, as a page alone."""
    from qinit_cli.draw import Screen

    from qinit.report.pictures.files import write_pictures
    from qinit.report.report import Report, is_training

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns on stderr while it lists the fonts
    screen = Screen(quiet=json_output)
    if is_training(directory):
        _training(screen, directory, out, json_output)
        return
    found = Report.read(directory)
    screen.report(found)
    picture, page = write_pictures(found, out or directory)
    screen.say(f"written to {picture} and {page}")
    if json_output:
        paths = {"png": str(picture.resolve()), "html": str(page.resolve())}
        sys.stdout.write(json.dumps({**paths, "totals": found.totals}) + "\n")


def _training(screen: Screen, directory: Path, out: Path | None, json_output: bool) -> None:
    """Draw a training's page again."""
    from qinit_cli.hush import hush

    hush()
    from qinit.snndlft.page import heading, redraw, summary
    from qinit.snndlft.report import SnnReport

    found = SnnReport.read(directory)
    screen.facts(heading(found), summary(found))
    for note in found.notes:
        screen.say(f"note: {note}")
    page = redraw(found, directory, out)
    screen.say(f"written to {page}")
    if json_output:
        sys.stdout.write(json.dumps({"html": str(page.resolve()), "totals": found.totals}) + "\n")
