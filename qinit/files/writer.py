"""Safetensors, written by byte range: a run knows the layout of its output before it starts, so the headers come first
and every tensor goes straight to its place. The safetensors package writes whole files from memory."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from qinit.files.tensors import DTYPE_NAMES, StoredTensor, Strand, TensorSpec, checksum


class SafetensorsWriter:
    """Writes tensors of known names and shapes, in any order, into one file or into shards with an index; none of them
    into no file.

    Headers are written at once; `write` puts a tensor at its place; `close` checks that all came and writes
    the index last. The files have their final names, so the directory itself should be a temporary one.

    `split` takes the places of all tensors, by name, and returns those of the parts that they come in.

    The layout follows from the arguments alone. A file of that layout that is there already is gone on with: `read`
    and `checksum` give what stands in it, and `keep` takes a tensor over.
    """

    def __init__(
        self,
        directory: Path,
        specs: Iterable[TensorSpec],
        stem: str = "model",
        max_bytes: int = 1 << 62,
        split: Callable[[dict[str, StoredTensor]], dict[str, StoredTensor]] = dict,
    ) -> None:
        self._directory = directory
        self._specs = list(specs)
        self._shards = _split(self._specs, max_bytes) if self._specs else []
        self._stem = stem
        self._places: dict[str, StoredTensor] = {}
        self._unsynced: set[Path] = {directory}
        for number, shard in enumerate(self._shards, 1):
            self._start_file(directory / self._file_name(number), shard)
        self._files = {name: place.file.name for name, place in self._places.items()}
        self._places = split(self._places)
        self._missing = set(self._places)

    def _file_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{number:05d}-of-{len(self._shards):05d}.safetensors"

    def _start_file(self, file: Path, shard: list[TensorSpec]) -> None:
        raw, nbytes = _header(shard), sum(spec.nbytes for spec in shard)
        if not _starts_with(file, raw, len(raw) + nbytes):
            with file.open("wb") as handle:
                handle.write(raw)
                handle.truncate(len(raw) + nbytes)
            self._unsynced.add(file)
        place = len(raw)
        for spec in shard:
            self._places[spec.name] = StoredTensor(spec.name, spec.dtype, spec.shape, file, place)
            place += spec.nbytes

    def has(self, name: str) -> bool:
        """Whether a tensor of that name is in the layout."""
        return name in self._places

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write one tensor; its dtype and shape must be the announced ones. Returns its checksum."""
        spec = self._places[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name}: announced as {spec.dtype} {spec.shape}, got {tensor.dtype} {tensor.shape}")
        return self.write_chunks(name, [tensor.contiguous().reshape(-1).view(torch.uint8)])

    def write_chunks(self, name: str, chunks: Iterable[torch.Tensor]) -> int:
        """Write one tensor from its raw bytes, given as flat uint8 tensors. Returns its checksum."""
        place = self._places[name]
        self._unsynced.add(place.file)
        if isinstance(place, Strand):
            raw = torch.cat(list(chunks))
            if raw.numel() != place.nbytes:
                raise ValueError(f"{name}: announced as {place.nbytes} bytes, got {raw.numel()}")
            _put(place.whole, [place.woven(raw)])
            self._missing.discard(name)
            return zlib.crc32(memoryview(raw.numpy().data))
        written, found = _put(place, chunks)
        if written != place.nbytes:
            raise ValueError(f"{name}: announced as {place.nbytes} bytes, got {written}")
        self._missing.discard(name)
        return found

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor that has been written."""
        return self._places[name].read()

    def checksum(self, name: str) -> int:
        """Return the checksum of what stands in a tensor's place."""
        return checksum(self._places[name])

    def keep(self, name: str) -> None:
        """Take what stands in a tensor's place for written."""
        self._missing.discard(name)

    def sync(self) -> None:
        """Bring to disk all that was written since the last call."""
        for path in self._unsynced:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._unsynced.clear()

    def close(self) -> None:
        """Flush to disk and, for several shards, write the index; raises ValueError if a tensor is missing."""
        if self._missing:
            raise ValueError(f"tensors announced but not written: {sorted(self._missing)[:5]}")
        self.sync()
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._specs)},
                "weight_map": self._files,
            }
            path = self._directory / f"{self._stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def headers_bytes(specs: Iterable[TensorSpec], max_bytes: int = 1 << 62) -> int:
    """Return what the headers of the files take that a SafetensorsWriter of these tensors writes; the index of several
    is not counted."""
    return sum(len(_header(shard)) for shard in _split(list(specs), max_bytes) if shard)


def _header(shard: list[TensorSpec]) -> bytes:
    """Return what stands in front of a file's tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in shard:
        entry = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape)}
        header[spec.name] = {**entry, "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _put(place: StoredTensor, chunks: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Write bytes to a tensor's place; returns how many there were, and their checksum."""
    written = found = 0
    with place.file.open("r+b", buffering=0) as handle:
        handle.seek(place.offset)
        for chunk in chunks:
            view = memoryview(chunk.numpy().data)
            written += len(view)
            found = zlib.crc32(view, found)
            while view:
                view = view[handle.write(view) :]
    return written, found


def _starts_with(file: Path, raw: bytes, size: int) -> bool:
    """Whether a file is there that has this size and these first bytes."""
    try:
        with file.open("rb") as handle:
            return os.fstat(handle.fileno()).st_size == size and handle.read(len(raw)) == raw
    except FileNotFoundError:
        return False


def _split(specs: list[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in order; a tensor larger than a shard gets one of its own. Without tensors there are none."""
    shards: list[list[TensorSpec]] = [[]] if specs else []
    room = max_bytes
    for spec in specs:
        if spec.nbytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards
