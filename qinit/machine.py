"""The machine: which device computes, what is free, and what a result is recorded with."""

from __future__ import annotations

import gc
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qinit.errors import RecipeError

CPU = torch.device("cpu")
PACKAGES = ("qinit", "torch", "transformers", "peft", "numba", "numpy")


@dataclass(frozen=True)
class Card:
    """A device that need not be here: its name, torch's word for what it is, and its memory in bytes."""

    name: str
    type: str
    memory: int


def pick_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`; raises RecipeError if it is not there. Of several
    processes that run together, each takes the GPU of its number on this machine."""
    own = os.environ.get("LOCAL_RANK", "")
    if own.isdigit() and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        name = f"cuda:{own}"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or 0)  # torch.device wraps large ones around
        if index >= count:
            raise RecipeError(f"device: no '{name}' here, torch sees {count} CUDA devices; use --device cpu or auto")
        return torch.device("cuda", index)
    return torch.device(name)


def ran_on() -> dict[str, Any]:
    """Return what a kept result ran on, no host names and no paths: the processor's name, how many cores this process
    may use, and the GPU's name where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _processor_name() or platform.processor() or None, "cores": cores, "gpu": gpu}


def device_name(device: torch.device) -> str:
    """Return what a device is called: a GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor_name() or platform.processor() or "cpu"


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the device; on the CPU with what the system holds as file cache only, and this
    process's part of it where several run together."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    return _free_on_host() // max(1, int(beside) if beside.isdigit() else 1)


def _free_on_host() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_room() -> None:
    """Give back to the GPUs what nothing needs any more, and what torch keeps of their memory for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def used_up(what: str, device: torch.device, batch: int) -> str:
    """Say that a device has no room for so many samples at once; `what` is being done with them."""
    return f"{what}: the memory of {device.type} is used up by a batch of {batch}"


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory that the device has, free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let a GPU multiply float32 matrices in TF32: factors of 11 bits, sums in float32, some eight times as fast. For
    what a model computes; never for statistics, solving and the accounting of errors."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def versions() -> dict[str, str]:
    """Versions of everything that can change a byte of the output."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def peak_memory_bytes() -> int:
    """The process's peak resident memory so far."""
    try:
        import resource
    except ImportError:  # pragma: no cover - Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor() -> str:
    """Return the processor's name and the instructions that torch uses on it. It may change last bits, but nobody who
    gets another machine after a reboot can choose it, so that it is no part of a run's signature."""
    return f"{_processor_name() or 'unknown'}, {torch.backends.cpu.get_cpu_capability()}"


def _processor_name() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None
