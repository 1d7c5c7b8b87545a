"""`qinit adapter`: where fine-tuning starts from, as an adapter: a published start of LoRA for a model, or, with
`--source`, the repair of a quantized base that exists."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from qinit_cli.eqft import interruptible, show_split, typed
from qinit_cli.families import with_recipe, write_family
from qinit_cli.hush import hush
from qinit_cli.options import METHOD_PANEL, MODEL_PANEL, OUTPUT_PANEL, recipe_options, takes
from qinit_cli.push import quiet_hub
from qinit_cli.verify import WANTING

if TYPE_CHECKING:
    from qinit.plan.plan import Plan
    from qinit.recipe import Recipe

CALIBRATING = (
    *("calibration", "calibration_budget", "text_field", "calibration_samples", "calibration_length"),
    *("calibration_mode", "quality", "polish"),
)


def _option(kind: Any, panel: str, text: str, *names: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel=panel, **more)]


@takes(
    *("recipe", "revision", "token", "trust_remote_code", "rank", "group_size", "symmetric", *CALIBRATING),
    *("target_modules", "exclude", "lora_alpha", "use_rslora", "seed"),
    *("format", "max_shard_size", "overwrite", "check", "device", "json_output", "quiet", "debug"),
    base=Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The model to start from, a directory or a Hub id. With --source a base that was quantized from that: "
            "GPTQ, AWQ, bitsandbytes NF4, compressed-tensors (pack-quantized), a run of qinit, or plain weights that "
            "were rounded.",
        ),
    ],
    source=_option(
        str | None, MODEL_PANEL, "What MODEL was quantized from: fit the adapter to what it has lost.", metavar="MODEL"
    ),
    method=_option(
        str | None,
        METHOD_PANEL,
        "A start that `qinit methods` lists; with --source eqft, or as eora, qera, lqer, cloq or loftq fit it.",
        show_default="with --source eqft",
    ),
    bits=_option(
        int | None,
        METHOD_PANEL,
        "Round the base in the same step, to 2, 3, 4 or 8 bits.",
        show_default="16: a base only where the method changes it",
    ),
    grid=_option(str | None, METHOD_PANEL, "What it is rounded to: int, or nf (normal floats).", show_default="int"),
    niter=_option(
        int | None,
        METHOD_PANEL,
        "Power iterations of pissa, in the place of a full decomposition.",
        show_default="full",
    ),
    corda_method=_option(
        str | None,
        METHOD_PANEL,
        "Of corda: ipm (the leading triplets, to learn the text's task) or kpm (the last ones, to keep what the text "
        "asks for).",
        show_default="ipm",
    ),
    use_dora=_option(bool | None, METHOD_PANEL, "Train the length of each row of W too.", "--use-dora/--no-use-dora"),
    out=_option(
        Path,
        OUTPUT_PANEL,
        "The adapter's directory; where there is a base to write, that of both, the adapter in eqft_init/.",
        metavar="DIR",
    ),
)
def adapter(**options: Any) -> None:
    """Write an adapter to start fine-tuning from: LoRA, DoRA, PiSSA and others for a model, in 16 bits or rounded in
    the same step; with --source the repair of a quantized base that exists. MODEL stays as it is."""
    from qinit_cli.draw import Screen

    options = with_recipe(options)
    if write_family(options):
        return
    screen = Screen(quiet=options["quiet"], to_stderr=options["json_output"])
    out, overwrite, token, source = (options.pop(name) for name in ("out", "overwrite", "token", "source"))
    recipe = _recipe(source, recipe_options(options))
    hush()
    from qinit.clock import Clock
    from qinit.machine import pick_device
    from qinit.planner.time import expected
    from qinit.runner.loadable import is_lost
    from qinit.runner.run import run
    from qinit.workplace.place import check_output

    quiet_hub(options["quiet"], options["debug"])
    device = pick_device(recipe.device)  # before anything is fetched
    made = _planned(recipe, token)
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


def _recipe(source: str | None, options: dict[str, Any]) -> Recipe:
    """Return the recipe: of a repair, of a start that leaves MODEL as its base, or of one that writes a base."""
    from qinit.errors import RecipeError
    from qinit.recipe import make_recipe
    from qinit.solver.methods import STARTS, get_method

    base, method = options.pop("base"), options["method"]
    if source is not None:
        return make_recipe(model=source, base=base, **options)
    if method is None:
        raise RecipeError(
            "--method: name a start that `qinit methods` lists, or give --source MODEL to repair a base that was "
            "quantized from that"
        )
    row, bits = get_method(method), options["bits"]
    if method not in STARTS and bits is None:
        raise RecipeError(f"--method {method}: rounds the base, so give --bits, or --source to repair one that exists")
    as_it_is = method in STARTS and row.start == "none" and bits in (None, 16)
    return make_recipe(model=base, base=base if as_it_is else None, **options)


def _planned(recipe: Recipe, token: str | None) -> Plan:
    from qinit.evaluate.subject import find_model
    from qinit.planner.make import make_plan

    assert recipe.model is not None
    source = find_model(recipe.model, recipe.revision, token)
    if recipe.base in (None, recipe.model):
        return make_plan(recipe, source, recipe.model, None if recipe.base is None else source)
    return make_plan(recipe, source, recipe.model, find_model(recipe.base, token=token))
