"""What a run does where the memory of a device is used up: less at once, then the CPU."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from qinit.errors import FullError
from qinit.events import Event, Noted
from qinit.machine import CPU, make_room, used_up
from qinit.processes.group import ALONE, Processes
from qinit.text.samples import Portion

T = TypeVar("T")


class Run(Protocol):
    """The job of a run: its device, its processes, and the layers that the device had no room for."""

    device: torch.device
    processes: Processes
    spilled: list[str]

    def note(self, text: str) -> Noted: ...


def in_portions(
    job: Run,
    what: str,
    do: Callable[[Portion], Generator[Event, None, T]],
    *,
    alone: bool = False,
    stays: bool = True,
) -> Generator[Event, None, T]:
    """Return what `do` gives, which takes a text through the model on the job's device. Where that has no room for as
    many samples as go at once, it is done anew with half of them; where it has none for one, on the CPU, where the rest
    of the run `stays` too. A note says so; `what` is being done.

    All processes of a run call it and do the same; where it is this one's `alone`, it alone. Raises FullError where
    nothing is left to try.
    """
    processes, device, parts, size = ALONE if alone else job.processes, job.device, 1, 1

    def portion(most: int) -> int:
        nonlocal size
        size = max(1, most // parts)
        return size

    while True:
        size = 1  # until it is asked for
        try:
            found = yield from do(portion)
            processes.meet(what)
        except (torch.OutOfMemoryError, FullError):
            pass  # with the error go the tensors of what has failed
        else:
            job.device = job.device if stays else device
            return found
        make_room()
        processes.recover(FullError(used_up(what, job.device, size)))
        size = max(processes.gather(size, "what goes at once"))  # some may have had nothing to do
        full = used_up(what, job.device, size)
        if size > 1:
            parts *= 2
            yield job.note(f"{full}, so it is done with {size // 2} at once")
        elif job.device != CPU:
            yield job.note(f"{full}, so that{' and all that follows' if stays else ''} is done on the CPU")
            job.device, parts = CPU, 1
        else:
            raise FullError(f"{full}; give the run more memory, or shorter texts (--calibration-length)")


def on_device_or_host(job: Run, name: str, do: Callable[[torch.device], T]) -> T:
    """Return what `do` gives, which solves the layer `name` on a device: the job's, or the CPU where that has no room
    for it."""
    try:
        return do(job.device)
    except torch.OutOfMemoryError:
        pass  # with the error go the tensors of what has failed
    make_room()
    job.spilled.append(name)
    return do(CPU)


def spill_note(names: list[str]) -> str:
    """Say which layers, at least one, did not fit on their device."""
    others = f" and {len(names) - 1} others" if names[1:] else ""
    return f"{names[0]}{others} did not fit into the device's memory; solved on the CPU"


def moved(value: Any, device: torch.device) -> Any:
    """Return a tensor, or a dataclass or a dict of such, on a device; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value
