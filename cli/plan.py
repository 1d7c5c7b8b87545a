"""`qinit plan`: what a run would do and take, and what fine-tuning would take after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from qinit_cli.hush import hush
from qinit_cli.options import CALIBRATING, CHOOSING, MIXING, QUANTIZING, READING, recipe_options, takes
from qinit_cli.push import quiet_hub

if TYPE_CHECKING:
    from qinit_cli.draw import Screen

    from qinit.machine import Card
    from qinit.plan.plan import Plan
    from qinit.planner.forecast import Asked, Forecast
    from qinit.planner.kinds import Kind
    from qinit.planner.operations import Machine
    from qinit.recipe import Recipe

AFTER_PANEL = "Where, and what comes after"
WHERE: dict[str, Any] = {
    "device_kind": Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Plan for a device that need not be here: cpu (this machine's, measured now) or one that was measured "
            "once, as h100.",
            show_default="the device that a run takes here",
            rich_help_panel=AFTER_PANEL,
        ),
    ],
    "processes": Annotated[
        int | None,
        typer.Option(
            min=1,
            help="On so many processes (torchrun), each with a device like it.",
            show_default="1",
            rich_help_panel=AFTER_PANEL,
        ),
    ],
    "train_length": Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens in each window of the fine-tuning.", show_default="1024", rich_help_panel=AFTER_PANEL
        ),
    ],
    "train_batch": Annotated[
        int | None,
        typer.Option(min=1, help="Windows on a device at once, there.", show_default="1", rich_help_panel=AFTER_PANEL),
    ],
}


@takes(
    *READING, "bits", *MIXING, *QUANTIZING, *CALIBRATING, *CHOOSING,
    "format", "save_dir", "out", "max_shard_size", "device", "json_output", "quiet", "debug", *WHERE, **WHERE,
)  # fmt: skip
def plan(**options: Any) -> None:
    """Show what eqft or meqft would do: every layer and byte, from headers alone, the time and the memory; and the
    memory of fine-tuning after it."""
    from qinit_cli.draw import Screen

    from qinit.errors import RecipeError
    from qinit.recipe import make_recipe

    screen = Screen(quiet=options["quiet"], to_stderr=options["json_output"])
    kind = options["device_kind"]
    if kind is not None and options["device"] is not None:
        raise RecipeError(
            f"--device-kind {kind} says where, and so does --device {options['device']}; give one of them"
        )
    own = {name: options.pop(name) for name in WHERE}
    if kind == "cpu":
        options["device"] = "cpu"
    recipe = make_recipe(options["recipe"], **recipe_options(options))
    show_plan(screen, recipe, options, **own)


def show_plan(screen: Screen, recipe: Recipe, options: dict[str, Any], **own: Any) -> None:
    """Plan, forecast and draw; `own` are the values of the options in WHERE, if they were given."""
    from qinit_cli.draw_plan import draw_plan, draw_qualities, write_plan

    hush()
    from qinit.machine import pick_device
    from qinit.planner.forecast import Asked, forecast
    from qinit.planner.kinds import load_kind
    from qinit.planner.operations import Machine

    kind = own.pop("device_kind", None)
    asked = Asked(**{name: value for name, value in own.items() if value is not None})
    machine = Machine(pick_device(recipe.device)) if kind in (None, "cpu") else load_kind(kind)
    made, out = find_plan(screen, recipe, {**options, "dry_run": True}, getattr(machine, "card", None))
    said = forecast(made, machine, asked)
    draw_plan(screen, said, out)
    if qualities := _qualities(said, options, machine, asked):
        draw_qualities(screen, qualities)
    if options["json_output"]:
        write_plan(said, out)


def _qualities(said: Forecast, options: dict[str, Any], machine: Machine | Kind, asked: Asked) -> dict[str, Forecast]:
    """Plan the same with each quality; nothing for a method or a model that takes no calibration."""
    from qinit.planner.forecast import forecast
    from qinit.planner.make import make_plan
    from qinit.recipe import QUALITIES, make_recipe

    made = said.plan
    if not made.recipe.calibrated:
        return {}
    found: dict[str, Forecast] = {}
    for quality in QUALITIES:
        if quality == made.recipe.quality:
            found[quality] = said
            continue
        recipe = make_recipe(options["recipe"], **{**recipe_options(options), "quality": quality})
        other = make_plan(recipe, made.checkpoint.directory, made.model_name, card=made.card)
        found[quality] = forecast(other, machine, asked)
    return found


def find_plan(screen: Screen, recipe: Recipe, options: dict[str, Any], card: Card | None = None) -> tuple[Plan, Path]:
    """Find the model and make the plan, for a `card` if it is not for what is here; returns it and the run's
    directory."""
    from qinit.source.demo import DEMO_NAME, DEMO_TITLE, demo_directory

    if recipe.model is None:
        screen.say(f"No MODEL given: using {DEMO_TITLE}.")

    hush()
    from qinit.hub.download import header_directory, local_directory
    from qinit.machine import pick_device
    from qinit.planner.make import make_plan

    quiet_hub(options["quiet"], options["debug"])
    pick_device(recipe.device)  # before anything is fetched
    if recipe.model is None:
        directory, name = demo_directory(), DEMO_NAME
    else:
        find = header_directory if options["dry_run"] else local_directory
        directory, name = find(recipe.model, recipe.revision, options["token"]), recipe.model
    made = make_plan(recipe, directory, name, card=card)
    out = options["out"]
    if out is None:
        short = Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]
        place = options["save_dir"] or Path("model_zoo") / ("meqft" if recipe.mixed else "eqft")
        out = place / f"{short}-{recipe.size_words}"
    return made, out
