"""What a plan will take: the run itself, on which device and how many, and fine-tuning after it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qinit.errors import RecipeError
from qinit.machine import Card, device_name, total_memory
from qinit.plan.plan import Plan
from qinit.planner.finetuning import FineTuning, fine_tuning
from qinit.planner.kinds import Kind
from qinit.planner.memory import working_bytes
from qinit.planner.operations import Machine
from qinit.planner.time import Estimate, estimate


@dataclass(frozen=True)
class Asked:
    """On how many `processes`, each with a device of its own, a run is to be, and what its adapter is trained on after
    it: `train_batch` windows at once, of `train_length` tokens."""

    processes: int = 1
    train_length: int = 1024
    train_batch: int = 1


@dataclass(frozen=True)
class Forecast:
    """What a plan will take on devices like `card`: `origin` says where the times come from, `working_bytes` are those
    of each process."""

    plan: Plan
    card: Card
    origin: str
    asked: Asked
    seconds: Estimate

    @property
    def where(self) -> str:
        """The devices, in words."""
        return self.card.name if self.asked.processes == 1 else f"{self.asked.processes} x {self.card.name}"

    @property
    def place(self) -> str:
        """Where a run is to be, as a part of a sentence."""
        return "here" if self.plan.card is None and self.asked.processes == 1 else f"on {self.where}"

    @property
    def working_bytes(self) -> int:
        return working_bytes(self.plan, self.asked.processes)

    @cached_property
    def tuning(self) -> dict[bool, FineTuning]:
        """What fine-tuning takes on each device, with gradient checkpointing and without."""
        size = self.asked.train_length, self.asked.train_batch
        autocast = self.card.type == "cuda"
        return {
            checkpointing: fine_tuning(self.plan, *size, checkpointing=checkpointing, autocast=autocast)
            for checkpointing in (True, False)
        }


def forecast(plan: Plan, machine: Machine | Kind, asked: Asked) -> Forecast:
    """Say what a plan will take on this machine, or on a kind of device that was measured. Raises RecipeError for more
    processes than there are layers to solve."""
    if asked.processes > len(plan.quantized):
        raise RecipeError(
            f"processes: {asked.processes} are more than the {len(plan.quantized)} layers that are solved; give fewer"
        )
    if isinstance(machine, Kind):
        card, origin = machine.card, "by what benchmarks/gpu.py measured there with EQFT"
    else:
        card = Card(device_name(machine.device), machine.device.type, total_memory(machine.device))
        origin = "by what was measured here just now"
    return Forecast(plan, card, origin, asked, estimate(plan, machine.device, machine, asked.processes))
