"""The index of the shards, and what stands in the place of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.hostile.world import (
    INDEX,
    NORM,
    OUT_OF,
    PART,
    World,
    add,
    device,
    fifo,
    folder,
    instead,
    link_out,
    loop,
    shard,
    sparse,
    write_index,
)


def placed(place: Any, tensor: str = NORM) -> Callable[[World], object]:
    """Shards, one of which the index names `place`."""

    def damage(world: World) -> None:
        names = shard(world)
        write_index(world, {**dict.fromkeys(names, "part.safetensors"), tensor: place})

    return damage


def index(text: bytes) -> Callable[[World], object]:
    def damage(world: World) -> None:
        shard(world)
        (world.model / INDEX).write_bytes(text)

    return damage


def circle(path: Path, world: World) -> None:
    other = path.with_name("other")
    path.symlink_to(other)
    other.symlink_to(path)


for name, damage, says in (
    ("leaves by ..", placed("../outside/moved"), "'../outside/moved', which is no plain file name"),
    ("leaves by root", placed("/etc/passwd"), "'/etc/passwd', which is no plain file name"),
    ("names a folder below", placed("a/b"), "'a/b', which is no plain file name"),
    ("names nothing", placed(""), "placed in '', which is no plain file name"),
    ("names .", placed("."), "placed in '.', which is no plain"),
    ("names ..", placed(".."), "placed in '..', which is no plain"),
    ("names a number", placed(3), "placed in 3, which is no plain file name"),
    ("names a list", placed(["part.safetensors"]), "which is no plain file name"),
    ("names a NUL", placed("a\0b"), "which is no plain file name"),
    ("names a line end", placed("a\nb"), "which is no plain file name"),
    ("names 10000 characters", placed("x" * 10_000), "which is no plain file name"),
    ("names a file in capitals", placed("PART.safetensors"), "PART.safetensors: missing, but"),
    ("places a tensor where it is not", placed(PART, "ghost"), "part.safetensors: lacks tensor 'ghost'"),
    ("no weight_map", index(b"{}"), "has no weight_map"),
    ("empty weight_map", index(b'{"weight_map":{}}'), "has no weight_map"),
    ("weight_map is a list", index(b'{"weight_map":["a"]}'), "has no weight_map"),
    ("a list", index(b"[]"), "expected a JSON object, found list"),
    ("no JSON", index(b"{'a'}"), "not valid JSON"),
    ("a tensor twice", index(b'{"weight_map":{"a":"x","a":"y"}}'), "'a' stands there twice"),
    ("deep", index(b'{"weight_map":' * 100_000), "nested too deeply"),
    ("5 million entries", index(b'{"weight_map":[' + b"1," * 5_000_000 + b"1]}"), "more than 4000000 values"),
    ("1 GB", sparse("model/" + INDEX, 10**9), "at most 67.1 MB are read"),
    ("link that leaves", instead(INDEX, link_out, sharded=True), OUT_OF),
    ("pipe", instead(INDEX, fifo, sharded=True), "model.safetensors.index.json: cannot be read (not a regular file)"),
    ("shard: link that leaves", instead(PART, link_out, sharded=True), OUT_OF),
    ("shard: link to itself", instead(PART, loop, sharded=True), "part.safetensors: Too many levels of symbolic links"),
    ("shard: links in a circle", instead(PART, circle, sharded=True), "Too many levels of symbolic links"),
    ("shard: pipe", instead(PART, fifo, sharded=True), "part.safetensors: not a regular file"),
    ("shard: folder", instead(PART, folder, sharded=True), "part.safetensors: not a regular file"),
    ("shard: endless device", instead(PART, device, sharded=True), f"{OUT_OF}/dev/zero"),
):
    if name == "1 GB":
        inner, damage = damage, lambda w, inner=damage: (shard(w), inner(w))
    add(f"index: {name}", says, damage)


SINGLE = "model.safetensors"


for name, make, says in (
    ("link that leaves", link_out, OUT_OF),
    ("dangling link", lambda path, w: path.symlink_to("gone"), "model.safetensors: missing, but"),
    ("pipe", fifo, "model.safetensors: not a regular file"),
    ("folder", folder, "model.safetensors: not a regular file"),
):
    add(f"weights: {name}", says, instead(SINGLE, make))
