"""What is carried from block to block: batches, how each block is called, and the hidden states between two blocks."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qinit.machine import CPU, free_memory
from qinit.stream.calls import Call, alike
from qinit.text.samples import Samples

CARRIED_SHARE = 0.25  # of the free memory, the device's or the machine's, that hidden states may take


@dataclass(frozen=True)
class Batch:
    """The samples from `start` to `stop`; `mask` [batch, length] is False where they are padded, None: nowhere. Its
    length is that of the longest of them, which may be less than all samples are padded to."""

    start: int
    stop: int
    mask: torch.Tensor | None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Return the batch's part of values [samples, length, ...]."""
        return values[self.rows] if self.mask is None else values[self.rows, : self.mask.shape[1]]

    @property
    def long_mask(self) -> torch.Tensor | None:
        """The mask as models take it."""
        return None if self.mask is None else self.mask.long()


def batches_of(samples: Samples, size: int) -> Iterator[Batch]:
    """Cut the samples into batches of `size`, the last one smaller."""
    for start in range(0, len(samples.tokens), size):
        stop = min(start + size, len(samples.tokens))
        mask = None if samples.mask is None else samples.mask[start:stop]
        if mask is not None:
            mask = mask[:, : int(mask.any(0).nonzero().max()) + 1]
        yield Batch(start, stop, mask)


class Calls:
    """How each block of a row is called: mostly alike for all batches of one size, but not with padding, nor where a
    block also gets something made of the tokens (Gemma 4's per-layer inputs).

    `made` has what the calls' slots stand for, such as the encoder's output, and is read on `device`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_size: dict[int, list[Call]] = {}
        self.own: dict[int, list[Call]] = {}
        self.made: list[Carried] = []

    def add(self, batch: Batch, calls: list[Call]) -> None:
        first = self.by_size.setdefault(batch.stop - batch.start, calls)
        pairs = zip(calls, first, strict=True)
        if not all(alike(call.args, other.args) and alike(call.kwargs, other.kwargs) for call, other in pairs):
            self.own[batch.start] = calls

    def of(self, batch: Batch, index: int, made: Sequence[torch.Tensor] | None = None) -> Call:
        """Return how block `index` is called for a batch, with `made` in the slots, if it is not to be read."""
        call = self.own.get(batch.start, self.by_size[batch.stop - batch.start])[index]
        if not self.made:
            return call
        return call.filled(self.read(batch) if made is None else made)

    def read(self, batch: Batch) -> list[torch.Tensor]:
        """Return what the slots stand for in a batch."""
        return [states.read(batch).to(self.device) for states in self.made]


class Carried:
    """Hidden states of all samples between two blocks, float32; on the device where `streams` of them fit there, else
    in the machine's memory, else on disk."""

    def __init__(self, shape: tuple[int, ...], file: Path, streams: int, device: torch.device) -> None:
        self.file, self.streams, self.device = file, streams, device
        size = 4 * torch.Size(shape).numel()
        place = place_for(streams * size, device)
        if place is not None:
            self.states = torch.empty(shape, device=place, pin_memory=place != device)
        else:
            _reserve(file, size)
            flat = torch.from_file(str(file), shared=True, size=torch.Size(shape).numel(), dtype=torch.float32)
            self.states = flat.view(shape)

    def twin(self, name: str) -> Carried:
        """Return another store with the same contents, its file under another name."""
        other = Carried(tuple(self.states.shape), self.file.with_name(name), self.streams, self.device)
        other.states.copy_(self.states)
        return other

    def read(self, batch: Batch) -> torch.Tensor:
        return batch.of(self.states)

    def write(self, batch: Batch, hidden: torch.Tensor) -> None:
        batch.of(self.states).copy_(hidden.detach())


def place_for(size: int, device: torch.device) -> torch.device | None:
    """Return where hidden states of so many bytes are kept: on the device, in the machine's memory, or (None) on
    disk."""
    return next((place for place in (device, CPU) if size <= CARRIED_SHARE * free_memory(place)), None)


def _reserve(file: Path, size: int) -> None:
    """Make a file of that size whose space is there: a full disk is an error now, under a mapped file it would kill the
    process. Some file systems promise nothing."""
    with file.open("wb") as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
