"""How long a run will take on this machine: what it computes, operation by operation, times what these take here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch

from qinit.calibration.shards import SHARDS
from qinit.plan.plan import Plan
from qinit.planner.kinds import Kind
from qinit.planner.operations import Machine
from qinit.planner.work import DISK_SPEED, Model, Work, file_bytes, loading, work_of
from qinit.processes.deal import deal
from qinit.solver.spec import LayerSpec
from qinit.widths.knapsack import tied
from qinit.words import duration

SHARED = ("calibrating", "allocating", "polishing")  # by the tokens of the text
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


def estimate(plan: Plan, device: torch.device, machine: Machine | Kind | None = None, processes: int = 1) -> Estimate:
    """Estimate a run's time with what else is going on here just now; takes at most about two seconds, and less with a
    `machine` that has measured before. A `Kind` stands for a device that is not here, and `processes` for as many
    devices like it: they share the text, deal the layers out, and the first writes."""
    machine = machine or Machine(device)
    work = sorted(work_of(plan, device, processes), key=lambda each: -each.count)
    _summed(plan, work, machine, processes)
    machine.sharpen()
    return _summed(plan, work, machine, processes)


def _summed(plan: Plan, work: Sequence[Work], machine: Machine | Kind, processes: int) -> Estimate:
    seconds: dict[str, float] = defaultdict(float)
    share = -(-SHARDS // processes) / SHARDS
    for each in work:
        taken = machine.seconds(each.operation, each.shape, each.count)
        seconds[each.part] += taken * share if each.part in SHARED else taken
    solving = _solving(plan, machine, processes)
    seconds["solving"] += solving
    if plan.pending:  # a round for each width, of the blocks that a process has
        blocks = len(Model(plan).blocks)
        part = -(-blocks // processes) / blocks
        rounds = len(plan.recipe.widths) / plan.recipe.iterations
        seconds["allocating"] += part * rounds * _solving(plan, machine, 1)
    seconds["writing"] += _files(plan, machine)
    if plan.recipe.check and plan.facts.causal:
        seconds["checking"] += STARTING
    return Estimate(**{field.name: seconds[field.name] for field in fields(Estimate)})


def _solving(plan: Plan, machine: Machine | Kind, processes: int) -> float:
    """Return how long it takes until all layers are solved. Those that read the same can be solved at the same time,
    and without data all."""
    alike: dict[tuple[LayerSpec, tuple[int, int]], list[str]] = defaultdict(list)
    for layer in plan.quantized:
        spec = replace(plan.layer_spec(layer), bits=plan.recipe.widths[0])
        module = layer.target.module
        alike[spec, (module.out_features, module.in_features)].append(module.name)
    costs: dict[str, float] = {}
    for (spec, shape), names in alike.items():
        costs |= dict.fromkeys(names, machine.solving(spec, *shape, len(names)) / len(names))
    if not plan.recipe.calibrated:
        return busiest(list(costs.values()), processes)
    experts: dict[str, list[str]] = defaultdict(list)
    for layer in plan.quantized:
        if layer.target.module.expert is not None:
            experts[layer.target.module.parameter].append(layer.target.name)
    alone = [layer.target.name for layer in plan.quantized if layer.target.module.expert is None]
    return sum(busiest([costs[name] for name in group], processes) for group in (*tied(alone), *experts.values()))


def busiest(costs: Sequence[float], processes: int) -> float:
    """Return what the busiest of the processes has to do."""
    loads = [0.0] * processes
    for cost, owner in zip(costs, deal(costs, processes), strict=True):
        loads[owner] += cost
    return max(loads)


def _files(plan: Plan, machine: Machine | Kind) -> float:
    if isinstance(machine, Kind):
        return machine.files(plan)
    each = loading(plan)
    return machine.seconds(each.operation, each.shape, each.count) + file_bytes(plan) / DISK_SPEED


def expected(plan: Plan, device: torch.device) -> tuple[str, ...]:
    """Say what a calibrated run will take on this machine, and of what that is the most; nothing for others, which are
    soon done."""
    if not plan.recipe.calibrated:
        return ()
    return (f"this run takes {in_words(estimate(plan, device))}",)


def expected_polish(plan: Plan, device: torch.device) -> str:
    """Say what a polish of a finished run will take on this machine: text that the model writes once more, its steps,
    and the check."""
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


def in_words(seconds: Estimate, where: str = "here") -> str:
    """Say an Estimate, and where, the parts of a second and more by name; the longest where there is none."""
    parts = {name: value for name, value in asdict(seconds).items() if value}
    said = {name: value for name, value in parts.items() if value >= 1} or {max(parts, key=lambda name: parts[name]): 1}
    named = ", ".join(f"{duration(value)} {WORDS[name]}" for name, value in said.items())
    return f"about {duration(seconds.total)} {where} ({named})"
