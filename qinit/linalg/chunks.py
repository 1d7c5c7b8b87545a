"""A matrix piece by piece: rows that fit into a cache, and groups of inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qinit.machine import CPU

ALL = slice(None)

# Temporaries of this many floats stay in a core's cache; on a GPU they keep all of it at work.
ROW_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


def row_chunks(rows: int, columns: int, *, device: torch.device = CPU) -> Iterator[slice]:
    """Yield slices of rows that hold about ROW_CHUNK_ELEMENTS elements each, of a matrix on that device."""
    step = max(1, ROW_CHUNK_ELEMENTS[device.type] // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """View [rows, in] as [rows, groups, group_size], padding the last group with zeros."""
    padding = -weight.shape[1] % group_size
    if padding:
        weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(weight.shape[0], -1, group_size)
