"""`qinit report`: a run's report as a table, a picture and a page."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from qinit_cli.options import DEBUG, RUN


def report(
    directory: RUN,
    out: Annotated[Path | None, typer.Option(help="Where the pictures go.", show_default="DIR")] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="The paths and the totals as JSON on stdout, nothing else.")
    ] = False,
    debug: DEBUG = False,
) -> None:
    """Draw a run: bits by layer, the error before and after the low rank, and bits against loss."""
    from qinit_cli.draw import Screen

    from qinit.report.pictures.files import write_pictures
    from qinit.report.report import Report

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns on stderr while it lists the fonts
    found = Report.read(directory)
    screen = Screen(quiet=json_output)
    screen.report(found)
    picture, page = write_pictures(found, out or directory)
    screen.say(f"written to {picture} and {page}")
    if json_output:
        paths = {"png": str(picture.resolve()), "html": str(page.resolve())}
        sys.stdout.write(json.dumps({**paths, "totals": found.totals}) + "\n")
