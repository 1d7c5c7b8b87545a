"""The header of a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.cli.hostile.world import NORM, UP, World, add, edit_config, sparse
from tests.helpers import rewrite_header


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> Callable[[World], object]:
    prefix = (len(header) if length is None else length).to_bytes(8, "little")
    return lambda world: (world.model / "model.safetensors").write_bytes(prefix + header + data)


def made_then(header: Callable[[], bytes]) -> Callable[[World], object]:
    """A file whose header is too large to be made before it is needed."""
    return lambda world: raw_file(header())(world)


def million_tensors() -> bytes:
    one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(one % number for number in range(1_000_000)) + b"}"


def entry(text: bytes) -> Callable[[World], object]:
    """A file of one tensor, `x`, with this entry and 8 bytes of data."""
    return raw_file(b'{"x":' + text + b"}", b"\0" * 8)


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[World], object]:
    """Change the good file's header; its data stay."""
    return lambda world: rewrite_header(world.model / "model.safetensors", change)


def shift(name: str, by: int) -> Callable[[World], object]:
    return header(lambda h: h[name].update(data_offsets=[place + by for place in h[name]["data_offsets"]]))


def empty_target(world: World) -> None:
    edit_config(intermediate_size=0)(world)

    def change(values: dict[str, Any]) -> None:
        start = 0
        for name, value in values.items():
            if name == "__metadata__":
                continue
            if ".mlp." in name:
                value["shape"] = [64, 0] if "down" in name else [0, 64]
            size = 2
            for count in value["shape"]:
                size *= count
            value["data_offsets"] = [start, start + size]
            start += size
        total.append(start)

    total: list[int] = []
    header(change)(world)
    file = world.model / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    os.truncate(file, 8 + length + total[0])


X = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


CORRUPT = "model.safetensors: corrupt safetensors header"


COUNTS = "'x' has a shape or offset that is no count"


for name, damage, says in (
    ("empty file", lambda w: (w.model / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    ("seven bytes", lambda w: (w.model / "model.safetensors").write_bytes(b"\1" * 7), "not a whole safetensors file"),
    ("length of 2^64-1", raw_file(b"{}", length=2**64 - 1), "header of 18446744073709551615 bytes"),
    ("length one too large", raw_file(b"{}", length=3), "header of 3 bytes in a file of 10"),
    ("length of 0", raw_file(b""), f"{CORRUPT} (Expecting value"),
    ("length above the limit", sparse("model/model.safetensors", 1 << 33, b"\0\0\0\0\1\0\0\0"), "not a whole safeten"),
    ("90 MB of NULs", sparse("model/model.safetensors", 90_000_008, (90_000_000).to_bytes(8, "little")), CORRUPT),
    ("not UTF-8", raw_file(b'{"\xff":1}'), "can't decode byte 0xff"),
    ("UTF-16", raw_file('{"x":1}'.encode("utf-16")), "can't decode byte 0xff"),
    ("a list", raw_file(b"[]"), "expected an object"),
    ("deep nesting", raw_file(b"[" * 100_000), "nested too deeply"),
    ("deep metadata", raw_file(b'{"__metadata__":' + b"[" * 70 + b"]" * 70 + b"}"), "nested more than 64 deep"),
    ("5 million lists", made_then(lambda: b"[" + b"[]," * 5_000_000 + b"0]"), "more than 4000000 values"),
    ("a million tensors", made_then(million_tensors), "more than 4000000 values"),
    ("a name twice", raw_file(b'{"x":' + X + b',"x":' + X + b"}", b"\0" * 8), "'x' stands there twice"),
    ("half a surrogate", raw_file(b'{"\\ud800":' + X + b"}", b"\0" * 8), "half of a surrogate pair"),
    ("offset before the file", shift(NORM, -(1 << 30)), f"'{NORM}' has a shape or offset that is no count"),
    ("offset behind the file", shift(NORM, 1 << 30), "overlaps another or leaves a gap"),
    ("overlap", shift(NORM, -8), "overlaps another or leaves a gap"),
    ("end before begin", entry(X.replace(b"[0,8]", b"[8,0]")), "takes 8 bytes, not -8"),
    ("three offsets", entry(X.replace(b"[0,8]", b"[0,8,9]")), "'x' lacks dtype, shape or data_offsets"),
    ("offset of 5000 digits", entry(X.replace(b",8]", b"," + b"9" * 5000 + b"]")), "4300 digits"),
    ("offset of 20 digits", entry(X.replace(b",8]", b"," + b"9" * 20 + b"]")), COUNTS),
    ("offset 8.0", entry(X.replace(b",8]", b",8.0]")), COUNTS),
    ("offset Infinity", entry(X.replace(b",8]", b",Infinity]")), COUNTS),
    ("shape NaN", entry(X.replace(b"[2]", b"[NaN]")), COUNTS),
    ("shape true", entry(X.replace(b"[2]", b"[true]")), COUNTS),
    ("shape is text", entry(X.replace(b"[2]", b'"2"')), COUNTS),
    ("shape of 100000 dimensions", entry(X.replace(b"[2]", b"[" + b"9," * 99_999 + b"9]")), COUNTS),
    ("shape that overflows", entry(X.replace(b"[2]", b"[%d,%d]" % (2**59, 2**59))), "bytes, not 8"),
    ("dtype null", entry(X.replace(b'"F32"', b"null")), "'x' has dtype None"),
    ("dtype unknown", entry(X.replace(b"F32", b"F128")), "'x' has dtype 'F128', known are"),
    ("entry is a list", entry(b"[1,2,3]"), "'x' lacks dtype, shape or data_offsets"),
    ("no tensors", raw_file(b"{}"), "its safetensors hold no tensors"),
    ("data behind the last tensor", raw_file(b'{"x":' + X + b"}", b"\0" * 9), "the header describes"),
    ("size mismatch", header(lambda h: h[NORM].update(shape=[65])), "of shape [65] takes 130 bytes, not 128"),
    ("empty target", empty_target, "is empty"),
    ("integer target", header(lambda h: h[UP].update(dtype="I16")), f"'{UP}' is torch.int16; qinit reads"),
    ("name of a target in capitals", header(lambda h: h.update({UP.upper(): h.pop(UP)})), "no weight for module"),
    (
        *("name that clears the screen", header(lambda h: h.update({"\x1b[2J\n": h.pop(NORM) | {"dtype": "Q7"}}))),
        "tensor '\\x1b[2J ' has dtype 'Q7'",
    ),
):  # fmt: skip
    add(f"header: {name}", says, damage)
