"""Safetensors, read by byte range, so that no more than one tensor is ever in memory.

The safetensors package maps whole files: the pages count as resident memory.
Format: 8 bytes little-endian header length, JSON header, data (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import FileIO
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.reading import open_regular, parse_json
from qinit.machine import CPU

INDEX_NAME = "model.safetensors.index.json"
CHUNK_BYTES = 16 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package itself
MAX_DIMENSIONS = 64  # of a tensor: PyTorch's own limit
HEADER_ONLY = "qinit_header_only"  # in a header's metadata: the data is elsewhere

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is stored or will be."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor's place: `offset` counts bytes from the start of `file`."""

    file: Path
    offset: int

    def slices(self) -> list[StoredTensor]:
        """Return its slices along the first dimension, each as a tensor of its own with the name NAME[i]."""
        size = self.nbytes // self.shape[0]
        return [
            StoredTensor(slice_name(self.name, i), self.dtype, self.shape[1:], self.file, self.offset + i * size)
            for i in range(self.shape[0])
        ]

    def blocks(self, count: int) -> list[StoredTensor]:
        """Return its rows in `count` blocks of the same size, each with the name NAME[i]."""
        shape, size = (self.shape[0] // count, *self.shape[1:]), self.nbytes // count
        return [
            StoredTensor(slice_name(self.name, i), self.dtype, shape, self.file, self.offset + i * size)
            for i in range(count)
        ]

    def strands(self, count: int) -> list[StoredTensor]:
        """Return `count` tensors of the same size, each with the name NAME[i] and every `count`-th value of a row."""
        shape = (*self.shape[:-1], self.shape[-1] // count)
        names = [slice_name(self.name, i) for i in range(count)]
        return [Strand(name, self.dtype, shape, self.file, self.offset, self, i) for i, name in enumerate(names)]

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[torch.Tensor]:
        """Yield the raw data as flat uint8 tensors of at most `size` bytes (a multiple of every itemsize)."""
        with _open(self.file) as handle:
            handle.seek(self.offset)
            for start in range(0, self.nbytes, size):
                buffer = torch.empty(min(size, self.nbytes - start), dtype=torch.uint8)
                _read_into(handle, buffer, self)
                yield buffer

    def announce(self) -> None:
        """Have the system fetch it from the disk while something else is done, where it can."""
        if hasattr(os, "posix_fadvise"):
            with _open(self.file) as handle:
                os.posix_fadvise(handle.fileno(), self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)

    def first_bytes(self, count: int) -> bytes:
        """Read the first `count` bytes of its data, or all if it has fewer."""
        buffer = torch.empty(min(count, self.nbytes), dtype=torch.uint8)
        with _open(self.file) as handle:
            handle.seek(self.offset)
            _read_into(handle, buffer, self)
        return buffer.numpy().tobytes()

    def read(self, device: torch.device = CPU) -> torch.Tensor:
        """Read the whole tensor in its stored dtype, to the device."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        with _open(self.file) as handle:
            handle.seek(self.offset)
            if device.type == "cuda":
                for part, stage in zip(buffer.split(CHUNK_BYTES), cycle(_stages(device)), strict=False):
                    stage.done.synchronize()
                    _read_into(handle, stage.buffer[: len(part)], self)
                    part.copy_(stage.buffer[: len(part)], non_blocking=True)
                    stage.done.record(torch.cuda.current_stream(device))
            else:
                _read_into(handle, buffer, self)
        return buffer.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Strand(StoredTensor):
    """Every so-manyth value of the tensor `whole`, from its value `first` on."""

    whole: StoredTensor
    first: int

    @property
    def step(self) -> int:
        return self.whole.numel // self.numel

    def read(self, device: torch.device = CPU) -> torch.Tensor:
        return self.whole.read(device).flatten()[self.first :: self.step].contiguous().reshape(self.shape)

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[torch.Tensor]:
        yield from self.read().flatten().view(torch.uint8).split(size)

    def woven(self, raw: torch.Tensor) -> torch.Tensor:
        """Return the bytes of `whole` as they stand, with other ones in the place of these."""
        whole = self.whole.read().flatten()
        whole[self.first :: self.step] = raw.view(self.dtype)
        return whole.view(torch.uint8)


@dataclass(frozen=True)
class _Stage:
    """Memory that a GPU copies from by itself, on its way to `done`: twice as fast as from other memory, and asked for
    once."""

    buffer: torch.Tensor
    done: torch.cuda.Event


@cache
def _stages(device: torch.device) -> tuple[_Stage, ...]:
    """Return two, of which one is filled while the other is copied."""
    with torch.cuda.device(device):
        return tuple(
            _Stage(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)
        )


def slice_name(name: str, index: int) -> str:
    """Return what a slice of a tensor is called: NAME[i], as the experts of a layer that are stored as one."""
    return f"{name}[{index}]"


def _open(file: Path) -> FileIO:
    with _readable(file):
        return open_regular(file)


@contextmanager
def _readable(file: Path, where: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read{where} ({error.strerror})") from error


def _read_into(handle: FileIO, buffer: torch.Tensor, tensor: StoredTensor) -> None:
    view = memoryview(buffer.numpy().data)
    while view:
        with _readable(tensor.file, f" in tensor '{tensor.name}'"):
            got = handle.readinto(view)
        if not got:
            raise CheckpointError(
                f"{tensor.file}: ends inside tensor '{tensor.name}'; the file changed, is truncated or "
                "holds a header only, for a plan"
            )
        view = view[got:]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check one file's header: sizes match shapes, data neither overlaps nor leaves the file.

    A file of `write_header_only` passes too. Raises CheckpointError naming the file and the tensor.
    """
    header, length, size = raw_header(file)
    metadata = header.pop("__metadata__", None)
    try:
        tensors = {name: _parse_entry(file, name, entry, 8 + length) for name, entry in header.items()}
    except ValueError as error:
        raise _corrupt(file, error) from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(f"{file}: tensor '{tensor.name}' overlaps another or leaves a gap before it")
        end += tensor.nbytes
    if isinstance(metadata, dict) and HEADER_ONLY in metadata:
        end = 8 + length
    if end != size:
        raise CheckpointError(
            f"{file}: the header describes {end} bytes but the file has {size}; it is truncated or damaged, "
            "download or copy it again"
        )
    return tensors


def raw_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Return a file's header as it stands there, its length and the file's; raises CheckpointError for none."""
    with _open(file) as handle, _readable(file):
        size = os.fstat(handle.fileno()).st_size
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: not a whole safetensors file (header of {length} bytes in a file of {size}); "
                "download or copy it again"
            )
        raw = handle.read(length)
    try:
        header = parse_json(raw)
        if not isinstance(header, dict):
            raise ValueError("expected an object")
    except ValueError as error:
        raise _corrupt(file, error) from None
    return header, length, size


def _corrupt(file: Path, error: ValueError) -> CheckpointError:
    return CheckpointError(f"{file}: corrupt safetensors header ({error}); download or copy it again")


def _parse_entry(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"tensor '{name}' lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor '{name}' has dtype {dtype!r}, known are {', '.join(DTYPES)}")
    numbers = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS else [None]
    if not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
        raise ValueError(f"tensor '{name}' has a shape or offset that is no count")
    tensor = StoredTensor(name, DTYPES[dtype], tuple(shape), file, data_start + begin)
    if tensor.nbytes != end - begin:
        raise ValueError(f"tensor '{name}' of shape {shape} takes {tensor.nbytes} bytes, not {end - begin}")
    return tensor


def write_header_only(file: Path, header: dict[str, Any]) -> None:
    """Write a file that ends where its data would start: enough for a plan, and no loader reads a tensor from it."""
    metadata = header.get("__metadata__")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), HEADER_ONLY: "true"}
    raw = json.dumps({**header, "__metadata__": metadata}).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw)


def checksum(tensor: StoredTensor) -> int:
    """Return the CRC-32 of a stored tensor's bytes."""
    found = 0
    for chunk in tensor.chunks():
        found = zlib.crc32(memoryview(chunk.numpy().data), found)
    return found
