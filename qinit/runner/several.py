"""Several processes set out on one run: held against each other, and told what the first one has found."""

from __future__ import annotations

import socket
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qinit.errors import OutputError, ProcessesError
from qinit.plan.plan import Plan
from qinit.processes.group import Processes
from qinit.workplace.place import Workplace, partial_of
from qinit.workplace.signature import chosen_here, differences, signature_of_process

PATIENCE = 5.0  # seconds until a file of another machine shows on a network's file system


def require_alike(plan: Plan, device: torch.device, processes: Processes) -> None:
    """Raise ProcessesError where processes would not do the same: other options, versions, thread counts or sources, or
    more of them than there are layers."""
    if processes.count > len(plan.quantized):
        raise ProcessesError(
            f"{processes.count} processes for {len(plan.quantized)} layers: some would have nothing to do; start at "
            f"most {len(plan.quantized)}"
        )
    require_same(signature_of_process(plan, device), processes)


def require_same(own: dict[str, Any], processes: Processes) -> None:
    """Raise ProcessesError where a process has something else than the first: `own` is flat, by names that a user
    knows."""
    everyone = processes.gather((socket.gethostname(), own), "what each was started with")
    for rank, (host, found) in enumerate(everyone):
        if changed := differences(everyone[0][1], found):
            raise ProcessesError(
                f"process {rank} of {processes.count} ({host}) was started with something else than the first: "
                f"{'; '.join(changed)}; start all with the same"
            )


def lead(plan: Plan, place: Workplace, processes: Processes) -> None:
    """Tell the other processes what was chosen. Raises OutputError where one does not see where the run works."""
    processes.from_first(lambda: ({key: getattr(plan, key) for key in _DECIDED}, _chosen(plan)), "the plan")
    require_seen(place.scratch, place.out, processes)


def require_seen(directory: Path, out: Path, processes: Processes) -> None:
    """Raise OutputError where a process does not see what the first one writes into a directory at `out`."""
    sign = directory / processes.from_first(lambda: _sign_in(directory), "where the first writes")
    seen = processes.gather((socket.gethostname(), processes.first or _appears(sign)), "who sees the output")
    if processes.first:
        sign.unlink()
    blind = [f"process {rank} ({host})" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise OutputError(
            f"{out}: {', '.join(blind)} does not see what the first process writes there; choose a place with --out "
            "that all machines share"
        )


def followed(plan: Plan, out: Path, processes: Processes) -> tuple[Plan, Workplace]:
    """Return the plan as the first process has it, and where the run works; nothing is written there."""
    decided, chosen = processes.from_first(_nothing, "the plan")
    place = Workplace(out, partial_of(out))
    require_seen(place.scratch, out, processes)
    return replace(plan, recipe=plan.recipe.model_copy(update=chosen), **decided), place


_DECIDED = ("calibration_reason", "polish_reason", "polish_brought")


def _chosen(plan: Plan) -> dict[str, Any]:
    return {key: getattr(plan.recipe, key) for key in chosen_here(plan)}


def _nothing() -> Any:
    raise AssertionError("the first process tells")


def _sign_in(directory: Path) -> str:
    sign = directory / uuid.uuid4().hex
    sign.touch()
    return sign.name


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
