"""Where hostile files live: the surroundings of a case, and what may be done to them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import helpers

NORM, UP, HEAD = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"


INDEX = "model.safetensors.index.json"


SECRET = "the secret"


@dataclass(frozen=True)
class World:
    """Where a case happens: `model` is a good model that it may damage, `outside` holds what is nobody's business; the
    commands run in `here`."""

    model: Path
    outside: Path
    here: Path


@dataclass(frozen=True)
class Case:
    """`commands` are each refused with `says`, in the same surroundings."""

    damage: Callable[[World], object]
    says: str
    commands: tuple[tuple[str, ...], ...]


CASES: dict[str, Case] = {}


PLAN, EQFT = ("plan", "{model}"), ("eqft", "{model}", "--out", "out")


def add(name: str, says: str, damage: Callable[[World], object], *commands: tuple[str, ...]) -> None:
    """Add a case. Without `commands` it is given to a run, and every fourth to the plan of one too: both read alike."""
    assert name not in CASES, name
    CASES[name] = Case(damage, says, commands or ((PLAN, EQFT) if len(CASES) % 4 == 0 else (EQFT,)))


def sparse(name: str, size: int, head: bytes = b"") -> Callable[[World], object]:
    """A file of a size that takes no space."""

    def damage(world: World) -> None:
        with (world.here / name if "/" not in name else world.model / name.split("/")[1]).open("wb") as handle:
            handle.write(head)
            handle.truncate(size)

    return damage


def shard(world: World) -> list[str]:
    """Turn the model into one shard, `part.safetensors`; returns its tensors' names."""
    file = (world.model / "model.safetensors").rename(world.model / "part.safetensors")
    raw = file.read_bytes()
    names = [name for name in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if name != "__metadata__"]
    write_index(world, dict.fromkeys(names, "part.safetensors"))
    return names


def write_index(world: World, weight_map: Any) -> None:
    (world.model / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def instead(name: str, make: Callable[[Path, World], object], sharded: bool = False) -> Callable[[World], object]:
    """Put something else in a file's place; the file itself moves outside."""

    def damage(world: World) -> None:
        if sharded:
            shard(world)
        path = world.model / name
        if path.exists():
            path.rename(world.outside / "moved")
        make(path, world)

    return damage


def link_out(path: Path, world: World) -> None:
    path.symlink_to(world.outside / "moved")


def loop(path: Path, world: World) -> None:
    path.symlink_to(path.name)


def fifo(path: Path, world: World) -> None:
    os.mkfifo(path)


def folder(path: Path, world: World) -> None:
    path.mkdir()


def device(path: Path, world: World) -> None:
    path.symlink_to("/dev/zero")


PART, OUT_OF = "part.safetensors", "a link that leads out of the directory, to "


def edit_config(**changes: Any) -> Callable[[World], object]:
    return lambda world: helpers.edit_config(world.model, **changes)


def beside(name: str, content: bytes) -> Callable[[World], object]:
    return lambda world: (world.model / name).write_bytes(content)


def text(name: str, content: bytes) -> Callable[[World], object]:
    return lambda world: (world.here / name).write_bytes(content)


def at(name: str, make: Callable[[Path, World], object]) -> Callable[[World], object]:
    return lambda world: make(world.here / name, world)
