"""What `--calibration auto` becomes: decided before anything is read."""

from __future__ import annotations

import torch

from qinit.machine import free_memory, measured_speed
from qinit.plan.limits import AUTO_SOURCE, LARGEST_SHARE
from qinit.plan.plan import Plan
from qinit.planner.time import calibration_cost
from qinit.solver.methods import CALIBRATED
from qinit.words import duration

LONGEST = 300.0  # seconds that `auto` may spend without being asked, on a machine of nominal speed:
NOMINAL_SPEED = {"cpu": 1.5e11, "cuda": 5e13}  # so that a busy machine writes the same bytes as an idle one


def choose(plan: Plan, device: torch.device) -> tuple[str, str]:
    """Decide `auto` for this plan and machine: the source (`self` or `none`) and the reason, for people."""
    if plan.recipe.method not in CALIBRATED:
        return "none", f"method {plan.recipe.method} takes none"
    facts = plan.facts
    if not facts.causal or facts.start is None:
        return "none", "the model writes no text of its own; give --calibration FILE to start closer"
    free = free_memory(device)
    if plan.bytes_before > LARGEST_SHARE * free:
        return "none", (
            f"writing its own text takes {plan.bytes_before / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free; "
            "give --calibration FILE to start closer"
        )
    nominal = calibration_cost(plan, AUTO_SOURCE, NOMINAL_SPEED[device.type]).seconds
    if nominal > LONGEST:
        here = duration(calibration_cost(plan, AUTO_SOURCE, measured_speed(device)).seconds)
        return "none", (
            f"on the model's own text it would take about {here} here; give --calibration self to have it all the "
            "same, or a file"
        )
    return AUTO_SOURCE, "on text that the model writes itself"
