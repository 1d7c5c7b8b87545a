"""What a measurement of sensitivities was made for, and whether it fits a plan."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qinit.errors import RecipeError
from qinit.plan.allocation import Option, Sensitivity
from qinit.plan.plan import Plan

SAMPLED_BYTES = 256  # of each weight, for the fingerprint
# What changes a measurement, beside the model itself.
SIGNED = ("method", "rank", "group_size", "seed", "calibration", "target_modules", "exclude", "rounding", "act_order")


def conditions(plan: Plan) -> dict[str, Any]:
    """Return what a measurement depends on: the source's tensors and the recipe."""
    digest = hashlib.sha256()
    for name, tensor in sorted(plan.checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(tensor.first_bytes(SAMPLED_BYTES))
    recipe = plan.recipe.model_dump(mode="json")
    return {"model": digest.hexdigest(), **{key: recipe[key] for key in SIGNED}}


def check_sensitivity(sensitivity: Sensitivity, plan: Plan, options: dict[str, list[Option]], file: Path) -> None:
    """Raise RecipeError unless it was measured for this plan and holds all `options` by layer."""
    anew = "leave the option out to measure anew"
    for key, value in conditions(plan).items():
        then = sensitivity.measured_for.get(key)
        if then != value:
            what = "another model" if key == "model" else f"another {key}"
            raise RecipeError(f"sensitivity: {file} was measured for {what} ({then!r}, now {value!r}); {anew}")
    for name, own in options.items():
        for option in own:
            if option not in sensitivity.nats.get(name, {}):
                raise RecipeError(
                    f"sensitivity: {file} has nothing on {name} at {option.bits} bits in groups of {option.group_size} "
                    f"and rank {option.rank}; {anew}"
                )
