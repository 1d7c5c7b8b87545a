"""A plan whose widths are to be measured, and a measurement as if it had been made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qinit.plan.allocation import Sensitivity
from qinit.plan.plan import Plan
from qinit.widths.budget import options
from qinit.widths.validity import conditions
from tests.helpers import calibrated_plan

MIXED = {"calibration": "none", "target_bits": 4, "bits_choices": [2, 3, 8]}


def mixed_widths(source: Path, **changes: Any) -> Plan:
    """Plan a run over 2, 3 and 8 bits on a checkpoint."""
    return calibrated_plan(source, **{**MIXED, **changes})


def made_up(plan: Plan) -> Sensitivity:
    """Return a measurement: the more bits, the less is lost, and by later layers less than by earlier ones."""
    nats = {
        name: {option: 0.125 / (option.bits + index) for option in own}
        for index, (name, own) in enumerate(options(plan).items())
    }
    return Sensitivity(conditions(plan), "Fisher information on 24 tokens: random", nats)
