"""`qinit adapter --method NAME` for the families of PEFT that are no LoRA, and what its --recipe says."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

SETTINGS = "settings"  # of an adapter configuration that is no LoRA's, among a command's options
TAKEN = frozenset(
    {
        *("base", "method", "out", "recipe", "revision", "token", "trust_remote_code", "rank", "lora_alpha", SETTINGS),
        *("target_modules", "exclude", "seed", "overwrite", "json_output", "quiet", "debug"),
    }
)


def with_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """Return a command's options with what its recipe says where they say nothing."""
    file: Path | None = options.pop("recipe")
    if file is None:
        return options
    from qinit.families import settings_in
    from qinit.recipe_files import read_recipe

    family, settings = settings_in(file)
    said = {"method": family, SETTINGS: settings} if family else read_recipe(file)
    if settings and not family and options["source"] is None:
        said.setdefault("method", "lora")  # what PEFT makes of it
    return {**options, **{key: value for key, value in said.items() if options.get(key) in (None, False)}}


def write_family(options: dict[str, Any]) -> bool:
    """Write the adapter where the options name a family that is no LoRA; returns whether they do."""
    from qinit.families import FAMILIES

    method = options["method"]
    if method not in FAMILIES:
        _require_no_slip(method)
        return False
    from qinit_cli.draw import Screen, size
    from qinit_cli.hush import hush
    from qinit_cli.push import quiet_hub

    from qinit.errors import RecipeError

    for name, value in options.items():
        if name not in TAKEN and value not in (None, False):
            raise RecipeError(f"--{name.replace('_', '-')}: PEFT starts {method} by itself; leave it out")
    settings = options.get(SETTINGS) or {}
    hush()
    from qinit.evaluate.subject import find_model
    from qinit.families.make import Wanted, make_adapter

    quiet_hub(options["quiet"], options["debug"])
    screen = Screen(quiet=options["quiet"], to_stderr=options["json_output"])
    base, out = options["base"], options["out"]
    place = find_model(base, options["revision"], options["token"])
    wanted = Wanted(
        place,
        str(place.resolve()) if Path(base).is_dir() else base,
        method,
        settings,
        options["rank"],
        options["lora_alpha"],
        options["target_modules"],
        options["exclude"],
        options["seed"] or 0,
        options["trust_remote_code"],
    )
    made = make_adapter(wanted, out, overwrite=options["overwrite"])
    family = FAMILIES[method]
    if family.note:
        screen.say(f"note: {family.note}")
    modules = f" in {made.modules} modules" if made.modules else ""
    screen.say(f"wrote {out}: {method}, {made.parameters:,} trained parameters{modules}, {size(made.nbytes)}. Load it:")
    for line in made.snippet:
        screen.say(f"    {line}")
    if options["json_output"]:
        sys.stdout.write(json.dumps({"directory": str(out.resolve()), "method": method, **asdict(made)}) + "\n")
    return True


def _require_no_slip(method: str | None) -> None:
    """Raise RecipeError for a name that is of nothing, and closest to one of the families."""
    from qinit.errors import RecipeError, did_you_mean
    from qinit.families import FAMILIES
    from qinit.solver.methods import METHODS, get_method

    if method is None:
        return
    try:
        get_method(method)
    except RecipeError:
        hint = did_you_mean(method, (*METHODS, *FAMILIES))
        if any(f"'{name}'" in hint for name in FAMILIES):
            raise RecipeError(f"--method: no '{method}'{hint}") from None
