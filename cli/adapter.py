"""`qinit adapter`: an adapter for a base that exists, fitted to what the base has lost of its original."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from qinit_cli.eqft import interruptible, show_split, typed
from qinit_cli.families import with_recipe, write_family
from qinit_cli.hush import hush
from qinit_cli.options import METHOD_PANEL, MODEL_PANEL, OUTPUT_PANEL, recipe_options, takes
from qinit_cli.push import quiet_hub
from qinit_cli.verify import WANTING

CALIBRATING = (
    *("calibration", "calibration_budget", "text_field", "calibration_samples", "calibration_length"),
    *("calibration_mode", "quality", "polish"),
)


def _option(kind: Any, panel: str, text: str, *names: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel=panel, **more)]


@takes(
    *("recipe", "revision", "token", "trust_remote_code", "rank", *CALIBRATING),
    *("target_modules", "exclude", "lora_alpha", "use_rslora", "seed"),
    *("overwrite", "check", "device", "json_output", "quiet", "debug"),
    base=Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="A quantized base, a directory or a Hub id: GPTQ, AWQ, bitsandbytes NF4, compressed-tensors "
            "(pack-quantized), a run of qinit, or plain weights that were rounded.",
        ),
    ],
    source=_option(
        str | None, MODEL_PANEL, "The model that BASE was quantized from, a directory or a Hub id.", metavar="MODEL"
    ),
    method=_option(
        str | None,
        METHOD_PANEL,
        "How the low rank is fitted: eqft, or as eora, qera, lqer, cloq or loftq fit it; qlora fits none.",
        show_default="eqft",
    ),
    out=_option(Path, OUTPUT_PANEL, "The adapter's directory.", metavar="DIR"),
)
def adapter(**options: Any) -> None:
    """Repair a quantized base that exists: fit an adapter to what it has lost of its original. BASE stays as it is."""
    from qinit_cli.draw import Screen

    from qinit.errors import RecipeError
    from qinit.recipe import make_recipe

    options = with_recipe(options)
    if write_family(options):
        return
    if options["source"] is None:
        raise RecipeError("--source: name the model that BASE was quantized from")
    screen = Screen(quiet=options["quiet"], to_stderr=options["json_output"])
    out, overwrite, token, source = (options.pop(name) for name in ("out", "overwrite", "token", "source"))
    recipe = make_recipe(model=source, **recipe_options(options))
    hush()
    from qinit.clock import Clock
    from qinit.evaluate.subject import find_model
    from qinit.machine import pick_device
    from qinit.planner.make import make_plan
    from qinit.planner.time import expected
    from qinit.runner.loadable import is_lost
    from qinit.runner.run import run
    from qinit.workplace.place import check_output

    quiet_hub(options["quiet"], options["debug"])
    device = pick_device(recipe.device)  # before anything is fetched
    base = find_model(options["base"], token=token)
    made = make_plan(recipe, find_model(source, recipe.revision, token), source, base)
    check_output(made, out, overwrite)
    events = run(made, out, overwrite=overwrite, command=typed(sys.argv[1:]), token=token)
    clock = Clock()
    with interruptible(out), clock if options["debug"] else nullcontext():
        report = screen.follow(made, events, (*made.notes, *expected(made, device)))
    if options["debug"]:
        show_split(clock.split())
    if options["json_output"]:
        screen.json_report(report, out)
    if is_lost(report.notes):
        raise typer.Exit(WANTING)
