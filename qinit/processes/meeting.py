"""Where the processes of one attempt meet: when torchrun starts all of them anew it may keep its store, with all that a
dead attempt has left in it."""

from __future__ import annotations

import time
import uuid

from torch.distributed import PrefixStore, Store

LONGEST = 600.0  # seconds until all must have come
PAUSE = 0.02


def meeting_place(store: Store, rank: int, count: int) -> Store:
    """Return a part of the store for these `count` processes alone. Each says hello with a name of its own; the first
    answers with that name and the place; and each says that it has read it, so that no answer to a dead process counts.

    Raises RuntimeError where one does not come.
    """
    own = uuid.uuid4().hex
    place = _answering(store, own, count) if rank == 0 else _answered(store, own, rank)
    return PrefixStore(f"qinit/{place}", store)


def _answering(store: Store, place: str, count: int) -> str:
    """Answer each process until it has understood."""
    deadline, missing = time.monotonic() + LONGEST, set(range(1, count))
    while missing:
        for rank in sorted(missing):
            if _read(store, f"understood {rank}") == place:
                missing.discard(rank)
            elif name := _read(store, f"hello {rank}"):
                store.set(f"answer {rank}", f"{name} {place}")
        _pause(deadline, f"process {min(missing, default=0)} has not come")
    return place


def _answered(store: Store, own: str, rank: int) -> str:
    """Say hello until the answer is for this process."""
    deadline = time.monotonic() + LONGEST
    store.set(f"hello {rank}", own)
    while True:
        name, _, place = _read(store, f"answer {rank}").partition(" ")
        if name == own:
            store.set(f"understood {rank}", place)
            return place
        _pause(deadline, "the first process does not answer")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(deadline: float, why: str) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(why)
    time.sleep(PAUSE)
