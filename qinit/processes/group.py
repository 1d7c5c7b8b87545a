"""The processes that carry out a run together: who is the first, what each is told, and sums in a fixed order.

All of them call the same functions in the same order. Each call begins with a meeting, in which a process that has
failed says so: then all of them raise that error, and none waits for one that will not come.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qinit.errors import LostError, QinitError

T = TypeVar("T")


class Processes:
    """This process, number `rank`, and the others of its run, `count` with it. One alone talks to nobody.

    Objects and tensors on the CPU go through the group `hosts` of torch.distributed, those on GPUs through `devices`.
    """

    def __init__(self, rank: int = 0, count: int = 1, hosts: Any = None, devices: Any = None) -> None:
        self.rank, self.count, self._hosts, self._devices = rank, count, hosts, devices
        self.failed = False  # whether all know of an error

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    def gather(self, value: T, what: str) -> list[T]:
        """Return what each process has given, by rank. `what` names the call, the same in all of them."""
        if not self.several:
            return [value]
        self._meet(what)
        found: list[Any] = [None] * self.count
        with _connected(self):
            dist.all_gather_object(found, value, group=self._hosts)
        return found

    def to_first(self, value: T, what: str) -> list[T]:
        """Return what each process has given, by rank, to the first; to the others nothing (an empty list)."""
        if not self.several:
            return [value]
        self._meet(what)
        found: list[Any] = [None] * self.count if self.first else []
        with _connected(self):
            dist.gather_object(value, found if self.first else None, dst=0, group=self._hosts)
        return found

    def from_first(self, make: Callable[[], T], what: str) -> T:
        """Return what `make` gives in the first process, which alone calls it."""
        if not self.several:
            return make()
        given: list[Any] = [make() if self.first else None]
        self._meet(what)
        with _connected(self):
            dist.broadcast_object_list(given, src=0, group=self._hosts)
        return given[0]

    def chain(self, tensors: Sequence[torch.Tensor], add: Callable[[int], None], what: str) -> None:
        """Take tensors of the same shapes through all processes, one after the other, in place: each but the first
        gets those of the one before and calls `add` with the place of one, to add its own; at the end all have those
        of the last."""
        if not self.several:
            return
        self._meet(what)
        last = self.count - 1
        for place, tensor in enumerate(tensors):
            if self.rank:
                with _connected(self):
                    dist.recv(tensor, self.rank - 1, group=self._group(tensor))
                add(place)
            if self.rank < last:
                with _connected(self):
                    dist.send(tensor, self.rank + 1, group=self._group(tensor))
        with _connected(self):
            for tensor in tensors:
                dist.broadcast(tensor, last, group=self._group(tensor))

    def spread(self, tensors: Sequence[torch.Tensor], owners: Sequence[int], what: str) -> None:
        """Give each tensor, in place, what it is in the process that owns it."""
        if not self.several:
            return
        self._meet(what)
        with _connected(self):
            for tensor, owner in zip(tensors, owners, strict=True):
                dist.broadcast(tensor, owner, group=self._group(tensor))

    def meet(self, what: str) -> None:
        """Wait until all processes are here. Raises the error of one that has failed."""
        if self.several:
            self._meet(what)

    def wait_for_the_end_of_the_first(self) -> None:
        """Return when the first process is gone."""
        with suppress(RuntimeError):
            dist.recv(torch.empty(1), 0, group=self._hosts)

    def fail(self, error: Exception) -> None:
        """Tell the others of an error that ends this process, and raise what all of them raise: that of the process
        with the lowest rank that has one."""
        if self.several and not self.failed:
            self._meet("an error", error)
        raise error

    def recover(self, error: QinitError) -> None:
        """Tell the others of an error that all of them go on from, each in its own way; returns once all know. Raises
        what is worse: another error of one of them."""
        with suppress(type(error)):
            self.fail(error)
        self.failed = False

    def _group(self, tensor: torch.Tensor) -> Any:
        return self._devices if tensor.is_cuda else self._hosts

    def _meet(self, what: str, error: Exception | None = None) -> None:
        mine = torch.tensor([int(error is not None), zlib.crc32(what.encode())])
        states = [torch.empty_like(mine) for _ in range(self.count)]
        with _connected(self):
            dist.all_gather(states, mine, group=self._hosts)
            if any(int(failed) for failed, _ in states):
                errors: list[Any] = [None] * self.count
                dist.all_gather_object(errors, None if error is None else _words(error), group=self._hosts)
            elif len({int(call) for _, call in states}) == 1:
                return
            else:
                errors = []
        self.failed = True
        rank, said = next(((rank, said) for rank, said in enumerate(errors) if said is not None), (self.rank, None))
        if said is None:
            raise RuntimeError(f"process {self.rank} is at '{what}' and others are not")
        raise error if error is not None and rank == self.rank else _error(*said)


def _words(error: Exception) -> tuple[type[QinitError] | None, str, tuple[str, ...], bool]:
    """Say what an error is, for another process to make it anew."""
    notes = tuple(getattr(error, "__notes__", ()))
    if not isinstance(error, QinitError):
        return None, f"{type(error).__name__}: {error}", notes, False
    return type(error), str(error), notes, isinstance(error.__cause__, OSError)


def _error(kind: type[QinitError] | None, text: str, notes: tuple[str, ...], while_reading: bool) -> Exception:
    error = RuntimeError(text) if kind is None else kind(text)
    for note in notes:
        error.add_note(note)
    if while_reading:  # a run is kept then
        error.__cause__ = OSError()
    return error


@contextmanager
def _connected(processes: Processes) -> Iterator[None]:
    """Say so where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        processes.failed = True
        raise LostError(
            f"another of the {processes.count} processes of this run is gone or cannot be reached from process "
            f"{processes.rank} ({' '.join(str(error).split())[:200]})"
        ) from None


ALONE = Processes()
