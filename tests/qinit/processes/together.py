"""A function carried out by several processes that talk to each other, forked from this one, or by threads."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def together(count: int, do: Callable[[Any], Any]) -> list[Any]:
    """Call `do` with the Processes of `count` processes; return what each returned, or the error it raised, by rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = [(rank, count, port, do, queue) for rank in range(count)]
    started = [context.Process(target=_child, args=each, daemon=True) for each in arguments]
    for process in started:
        process.start()
    results = dict(queue.get(timeout=60) for _ in started)
    for process in started:
        process.join(60)
        if process.is_alive():
            process.kill()
            raise TimeoutError("a process has given its result and does not end")
    return [results[rank] for rank in range(count)]


def _child(rank: int, count: int, port: int, do: Callable[[Any], Any], queue: Any) -> None:
    import torch

    from qinit.processes.join import joined

    torch.set_num_threads(1)
    words = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in words.items()})
    result: Any = None
    try:
        with joined() as processes:
            result = do(processes)
            queue.put((rank, result))
    except Exception as error:
        queue.put((rank, error))
        queue.close()
        queue.join_thread()


class Threads:
    """Stands for the Processes of threads, where what they do cannot be forked: they share rows, nothing else."""

    def __init__(self, rank: int, count: int, met: threading.Barrier, given: dict[int, Any]) -> None:
        self.rank, self.count, self.several, self._met, self._given = rank, count, True, met, given

    def spread(self, tensors: Sequence[Any], owners: Sequence[int], what: str) -> None:
        self._given[self.rank] = tensors
        self._met.wait(60)
        for place, (tensor, owner) in enumerate(zip(tensors, owners, strict=True)):
            tensor.copy_(self._given[owner][place])
        self._met.wait(60)


def in_threads(count: int, do: Callable[[Any], Any]) -> list[Any]:
    """Call `do` with the Threads of `count` threads; return what each returned."""
    met, given = threading.Barrier(count), {}
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: do(Threads(rank, count, met, given)), range(count)))
