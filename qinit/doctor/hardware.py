"""The machine: processor, memory and disk, as far as the system tells. Imports nothing that may be broken."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

# What torch, bitsandbytes and the packed kernels choose their code by.
FEATURES = ("fma", "f16c", "avx", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Place:
    """A directory that a run writes to, and the free bytes on its disk."""

    what: str
    path: str
    free: int


@dataclass(frozen=True)
class Hardware:
    """Sizes are bytes, None where the system does not say; `memory_limit` is the container's."""

    system: str
    cpu: str
    cores: int
    features: tuple[str, ...]
    memory: int | None
    memory_available: int | None
    memory_limit: int | None
    disks: tuple[Place, ...]


def hardware() -> Hardware:
    """Describe this machine."""
    processor, memory = _fields(Path("/proc/cpuinfo")), _fields(Path("/proc/meminfo"))
    flags = (processor.get("flags") or processor.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    places = {"current directory": Path.cwd(), "Hub cache": hub_cache(), "temporary files": Path(tempfile.gettempdir())}
    return Hardware(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=processor.get("model name") or platform.processor() or platform.machine(),
        cores=cores,
        features=tuple(feature for feature in FEATURES if feature in flags),
        memory=_kilobytes(memory.get("MemTotal")),
        memory_available=_kilobytes(memory.get("MemAvailable")),
        memory_limit=memory_limit(),
        disks=tuple(Place(what, str(path), _free(path)) for what, path in places.items()),
    )


def memory_limit(root: Path = CGROUP) -> int | None:
    """Return what the container may use, None without a limit; cgroup version 2 first, then 1."""
    for file in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        text = _text(file).strip()
        if text.isdecimal():
            return int(text) if int(text) < 1 << 60 else None  # version 1 writes nearly 2^63 for none
    return None


def hub_cache() -> Path:
    """Return where huggingface_hub keeps models, without importing it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _fields(file: Path) -> dict[str, str]:
    """Return the first value of each `name : value` line."""
    found: dict[str, str] = {}
    for name, value in re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", _text(file), re.MULTILINE):
        found.setdefault(name, value)
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _kilobytes(text: str | None) -> int | None:
    return int(text.split()[0]) * 1024 if text else None


def _free(path: Path) -> int:
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free
