"""An export for llama.cpp, read back. A GGUF file (ggml's docs/gguf.md): a magic number and counts, keys and values,
the tensors' names, shapes (the fastest dimension first), types and places, and after a gap the data. The package of
that name is not used here: its list of types is older than Q2_0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from qinit.errors import CheckpointError
from qinit.exports.gguf.blocks import BLOCK_TYPES, BlockType
from qinit.exports.gguf.families import FAMILIES
from qinit.exports.gguf.layout import FLOATS, FloatType
from qinit.exports.reread import Reread
from qinit.files.reading import open_regular
from qinit.files.tensors import StoredTensor

TYPES: dict[int, BlockType | FloatType] = {each.number: each for each in (*BLOCK_TYPES, *FLOATS)}
PLAIN = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9  # of the types of values
MOST = 1 << 26  # bytes of a text, and things in a list
ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor(StoredTensor):
    """Its bytes as uint8 [rows, bytes], and the type that they are of."""

    type: BlockType | FloatType
    numbers: tuple[int, ...]

    def value(self) -> torch.Tensor:
        raw = self.read()
        if isinstance(self.type, BlockType):
            return self.type.decode(raw)
        return raw.view(self.type.dtype).float().reshape(self.numbers)


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return a file's values by key and its tensors by name. Raises CheckpointError for a damaged one."""
    try:
        with BufferedReader(open_regular(file)) as handle:
            magic, version, tensors, keys = struct.unpack("<4sIQQ", _bytes(handle, 24))
            if magic != b"GGUF" or version != 3 or max(tensors, keys) > MOST:
                raise ValueError("no GGUF file of version 3")
            values = {_text(handle): _value(handle, _number(handle, "<I")) for _ in range(keys)}
            entries = [_entry(handle) for _ in range(tensors)]
            alignment = int(values.get("general.alignment", ALIGNMENT))
            start = -(-handle.tell() // alignment) * alignment
        found = {entry[0]: _tensor(file, start, *entry) for entry in entries}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); export the run again") from None
    return values, found


def _entry(handle: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name, count = _text(handle), _number(handle, "<I")
    if count > 4:
        raise ValueError(f"tensor '{name}' has {count} dimensions")
    shape = tuple(_number(handle, "<Q") for _ in range(count))[::-1]
    return name, shape, _number(handle, "<I"), _number(handle, "<Q")


def _tensor(file: Path, start: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
    kind = TYPES.get(number)
    if kind is None or not shape:
        raise ValueError(f"tensor '{name}' is of type {number} and shape {list(shape)}, which qinit does not write")
    rows = prod(shape[:-1]), kind.row_bytes(shape[-1])
    return GgufTensor(name, torch.uint8, rows, file, start + offset, kind, shape)


def _bytes(handle: BinaryIO, count: int) -> bytes:
    found = handle.read(count)
    if len(found) < count:
        raise ValueError("ends too early")
    return found


def _number(handle: BinaryIO, form: str) -> Any:
    return struct.unpack(form, _bytes(handle, struct.calcsize(form)))[0]


def _text(handle: BinaryIO) -> str:
    length = _number(handle, "<Q")
    if length > MOST:
        raise ValueError(f"a text of {length} bytes")
    return _bytes(handle, length).decode("utf-8")


def _value(handle: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _text(handle)
    if kind != ARRAY:
        if kind not in PLAIN:
            raise ValueError(f"a value of type {kind}")
        return _number(handle, PLAIN[kind])
    inner, count = _number(handle, "<I"), _number(handle, "<Q")
    if count > MOST or inner == ARRAY:
        raise ValueError(f"a list of {count} values of type {inner}")
    return [_value(handle, inner) for _ in range(count)]


class RereadGguf(Reread):
    def __init__(self, base: Path, adapter: Path, class_name: str) -> None:
        if class_name not in FAMILIES:
            raise CheckpointError(f"{base}: {class_name} is not written as GGUF")
        self.family = FAMILIES[class_name]
        keys, self.base = read_gguf(base)
        there = adapter.is_file()
        more, self.factors = read_gguf(adapter) if there else ({}, {})
        try:
            stem = f"{self.family.architecture}.attention."
            heads = {"num_attention_heads": keys[f"{stem}head_count"], "head_dim": keys[f"{stem}key_length"]}
            self.config = SimpleNamespace(**heads, num_key_value_heads=keys[f"{stem}head_count_kv"])
            self.alpha = float(more["adapter.lora.alpha"]) if there else 0.0
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{base}: lacks key {error}") from None
        self.tensors = {**self.base, **self.factors}

    def value(self, parameter: str) -> torch.Tensor | None:
        name = self.family.place(parameter)
        stored = None if name is None else self.base.get(name)
        return None if stored is None else self._ordered(parameter.rpartition(".")[0], stored.value())

    def change(self, module: str) -> torch.Tensor | None:
        name = self.family.place(f"{module}.weight")
        a, b = (self.factors.get(f"{name}.lora_{side}") for side in "ab")
        if a is None or b is None:
            return None
        return self._ordered(module, self.alpha / a.numbers[0] * (b.value() @ a.value()))

    def _ordered(self, module: str, value: torch.Tensor) -> torch.Tensor:
        """Put rows back to where the model has them."""
        order = self.family.order(module, self.config)
        return value if order is None else value[order.argsort()]
