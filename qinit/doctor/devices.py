"""The devices that torch sees: which one a run takes, and which ones several processes would."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinit.machine import device_name, free_memory, pick_device, total_memory


@dataclass(frozen=True)
class Device:
    """A device by the name that `--device` takes; `memory` and what is `free` of it are bytes. A run without the option
    takes the one that is `used`."""

    device: str
    name: str
    memory: int
    free: int
    used: bool


def devices() -> list[Device]:
    """Return the processor and every GPU, what a run takes first."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    used = pick_device("auto")
    found = [torch.device("cpu"), *(torch.device("cuda", number) for number in gpus)]
    described = [
        Device(
            str(device),
            device_name(device),
            total_memory(device),
            free_memory(device),
            device.type == used.type and (device.index or 0) == (used.index or 0),
        )
        for device in found
    ]
    return sorted(described, key=lambda device: not device.used)


def process_words(found: list[Device]) -> str:
    """Say with how many processes a run uses this machine."""
    gpus = sum(device.device.startswith("cuda") for device in found)
    if gpus > 1:
        return f"one uses one GPU; torchrun --nproc-per-node {gpus} -m qinit eqft ... uses all {gpus}"
    return f"one, of {torch.get_num_threads()} threads on the processor"
