"""How long a run will take on this machine: what it computes, operation by operation, times what these take here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch

from qinit.plan.plan import LayerPlan, Plan
from qinit.planner.operations import Machine
from qinit.planner.work import Work, file_bytes, work_of
from qinit.words import duration

# Bytes per second of a file that the system holds in its memory, or on a solid disk. Not measured: the run reads each
# byte for the first time where the measurement could only read some for the second.
DISK_SPEED = 1e9
STARTING = 2.0  # seconds of a check: its text is read, and two models are set up


@dataclass(frozen=True)
class Estimate:
    """Seconds: to write the calibration text or read it, to measure the layers on it (`calibrating`), to measure how
    sensitive they are to their widths (`allocating`), to solve them all, to read and write files (`writing`), to polish
    and to check."""

    text: float = 0.0
    calibrating: float = 0.0
    allocating: float = 0.0
    solving: float = 0.0
    writing: float = 0.0
    polishing: float = 0.0
    checking: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


WORDS = {
    "text": "to write the text",
    "calibrating": "to measure the layers on it",
    "allocating": "to choose widths",
    "solving": "to solve",
    "writing": "to read and write files",
    "polishing": "to polish",
    "checking": "to check",
}


def estimate(plan: Plan, device: torch.device, machine: Machine | None = None) -> Estimate:
    """Estimate a run's time with what else is going on here just now; takes at most about two seconds, and less with a
    `machine` that has measured before."""
    machine = machine or Machine(device)
    work = sorted(work_of(plan, device), key=lambda each: -each.count)
    _summed(plan, work, machine)
    machine.sharpen()
    return _summed(plan, work, machine)


def _summed(plan: Plan, work: Sequence[Work], machine: Machine) -> Estimate:
    seconds: dict[str, float] = defaultdict(float)
    for each in work:
        seconds[each.part] += machine.seconds(each.operation, each.shape, each.count)
    layers = Counter(
        (replace(plan.layer_spec(layer), bits=plan.recipe.widths[0]), _shape(layer)) for layer in plan.quantized
    )
    solving = sum(machine.solving(spec, *shape, count) for (spec, shape), count in layers.items())
    seconds["solving"] += solving
    if plan.pending:  # a round for each width
        seconds["allocating"] += len(plan.recipe.widths) * solving / plan.recipe.iterations
    seconds["writing"] += file_bytes(plan) / DISK_SPEED
    if plan.recipe.check and plan.facts.causal:
        seconds["checking"] += STARTING
    return Estimate(**{field.name: seconds[field.name] for field in fields(Estimate)})


def _shape(layer: LayerPlan) -> tuple[int, int]:
    return layer.target.module.out_features, layer.target.module.in_features


def expected(plan: Plan, device: torch.device) -> tuple[str, ...]:
    """Say what a calibrated run will take on this machine, and of what that is the most; nothing for others, which are
    soon done."""
    if not plan.recipe.calibrated:
        return ()
    return (f"this run takes {in_words(estimate(plan, device))}",)


def expected_polish(plan: Plan, device: torch.device) -> str:
    """Say what a polish of a finished run will take on this machine: its text, its steps and the check."""
    machine, parts = Machine(device), ("text", "polishing", "checking")
    work = [each for each in work_of(plan, device) if each.part in parts]
    work.sort(key=lambda each: -each.count)
    for again in (False, True):
        if again:
            machine.sharpen()
        seconds = dict.fromkeys(parts, 0.0)
        for each in work:
            seconds[each.part] += machine.seconds(each.operation, each.shape, each.count)
    return f"this polish takes {in_words(Estimate(**seconds))}"


def in_words(seconds: Estimate) -> str:
    """Say an Estimate, the parts of a second and more by name; the longest where there is none."""
    parts = {name: value for name, value in asdict(seconds).items() if value}
    said = {name: value for name, value in parts.items() if value >= 1} or {max(parts, key=lambda name: parts[name]): 1}
    named = ", ".join(f"{duration(value)} {WORDS[name]}" for name, value in said.items())
    return f"about {duration(seconds.total)} here ({named})"
