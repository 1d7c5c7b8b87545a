"""`qinit export`: a finished run in the form that another program reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from qinit_cli.options import AS_JSON, DEBUG, IN_ITS_PLACE, RUN, TRUSTED


def export(
    directory: RUN,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="The form: dense, gguf, mlx, compressed-tensors, gptq, auto-round or bnb-nf4.",
            show_default=False,
        ),
    ],
    adapter: IN_ITS_PLACE = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write it.", show_default="DIR-FORMAT")
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Write it although FORMAT does not hold Q to the last bit.")
    ] = False,
    trust_remote_code: TRUSTED = False,
    json_output: AS_JSON = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Nothing but the exit code.")] = False,
    debug: DEBUG = False,
) -> None:
    """Write base and adapter of a finished run in the form that another program reads."""
    from qinit_cli.draw import Screen
    from qinit_cli.hush import hush

    hush()
    from qinit.exports import FinishedRun
    from qinit.exports.write import export as write
    from qinit.exports.write import export_named

    screen = Screen(quiet=quiet, to_stderr=json_output)
    form = export_named(to)
    place = out or Path(f"{directory.resolve()}-{to}")
    run = FinishedRun.open(directory, adapter, trust_remote_code=trust_remote_code)
    lost = write(run, to, place, requantize=requantize)
    for note in filter(None, (*run.notes, lost)):
        screen.say(f"note: {note}")
    screen.say(f"wrote {place}, for {form.reader}")
    if json_output:
        files = {
            str(file.relative_to(place)): file.stat().st_size for file in sorted(place.rglob("*")) if file.is_file()
        }
        result = {"directory": str(place.resolve()), "to": to, "lost": lost}
        sys.stdout.write(json.dumps({**result, "files": files}) + "\n")
