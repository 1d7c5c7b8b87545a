"""What a method takes on the disk, for the table."""

from __future__ import annotations

from qinit.errors import CompareError, RecipeError
from qinit.plan.plan import Plan
from qinit.planner.make import make_plan
from qinit.recipe import Recipe


def bits_as_stored(plan: Plan) -> float:
    """Return bits per quantized weight as the method's packed form holds them: GPTQ for the integer grid where it
    takes the same layers, else what the grid needs (for normal floats a float32 absmax per group)."""
    if plan.recipe.format == "gptq":
        return plan.bits_per_weight
    recipe = plan.recipe.model_dump() | {"format": "gptq"}
    try:
        packed = make_plan(Recipe(**recipe), plan.checkpoint.directory, plan.model_name)
    except (ValueError, RecipeError, CompareError):
        return plan.grid_bits_per_weight
    same = len(packed.quantized) == len(plan.quantized)
    return packed.bits_per_weight if same else plan.grid_bits_per_weight
