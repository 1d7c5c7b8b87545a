"""How many steps of polish there are where nobody says: by the quality that is asked for, and by what they cost."""

from __future__ import annotations

import torch

from qinit.machine import total_memory
from qinit.plan.limits import LARGEST_SHARE
from qinit.plan.plan import Plan
from qinit.planner.memory import polishing_bytes
from qinit.planner.nominal import polishing_seconds
from qinit.recipe import SELF
from qinit.text.sources import why_unreadable
from qinit.words import duration

MOST_STEPS = {"fast": 0, "balanced": 200, "best": 400}
FEWEST_STEPS = 50  # fewer are hardly worth the source's pass over their text
BUDGET = {"fast": 0.0, "balanced": 300.0, "best": 4 * 3600.0}  # seconds at nominal speed
SLOW = ("cpu",)  # devices on which nobody waits for it who has not asked


def choose_polish(plan: Plan, device: torch.device) -> tuple[int, str]:
    """Return how many steps there are, and the reason, for people; an empty one where nobody would ask."""
    quality, asked = plan.recipe.quality, plan.recipe.quality == "best"
    if not asked and (quality == "fast" or device.type in SLOW):
        return 0, ""
    if not plan.recipe.calibrated or not plan.facts.causal:
        return 0, "none, as there is no calibration text of a language model" if asked else ""
    if not plan.polishable:
        return 0, "none, as it trains linear layers, and only experts are chosen" if asked else ""
    needed = polishing_bytes(plan)
    there = total_memory(device) if plan.card is None else plan.card.memory
    if needed > 2 * LARGEST_SHARE * there:
        return 0, f"none, it needs {needed / 1e9:.1f} GB and the device has {there / 1e9:.1f} GB" if asked else ""
    steps, budget = MOST_STEPS[quality], BUDGET[quality]
    while steps >= FEWEST_STEPS and polishing_seconds(plan, steps) > budget:
        steps //= 2
    if steps < FEWEST_STEPS:
        seconds = polishing_seconds(plan, FEWEST_STEPS)
        return 0, f"none, {FEWEST_STEPS} steps would take about {duration(seconds)} at nominal speed" if asked else ""
    return steps, f"{steps} steps, about {duration(polishing_seconds(plan, steps))} at nominal speed"


def brings_text(plan: Plan) -> bool:
    """Whether a polish reads the text that qinit brings beside the model's own: where the tokenizer can. A plan
    whose calibration `auto` chose may yet become one on own text, as it was when an unfinished run was started."""
    recipe = plan.recipe
    if recipe.calibration != SELF and not plan.calibration_reason:
        return False
    return not why_unreadable(plan.checkpoint.directory, plan.facts, recipe.trust_remote_code)
