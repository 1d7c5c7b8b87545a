"""Carries out a comparison's cells, here or in worker processes, and tells what happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from qinit.compare.comparison import Cell, Comparison
from qinit.compare.measure import work
from qinit.compare.schedule import Schedule
from qinit.errors import CompareError, OutputError, QinitError

STEP_SECONDS = 1.0  # between two reports of a cell's progress


@dataclass(frozen=True)
class Begun:
    """A cell is being worked on."""

    cell: Cell


@dataclass(frozen=True)
class Stepped:
    """So many steps of a cell's fine-tuning are done; the loss of the last one in nats."""

    cell: Cell
    step: int
    loss: float


@dataclass(frozen=True)
class Ended:
    """A cell is done; `found` is what it found, or under `failed` why it found nothing."""

    cell: Cell
    found: dict[str, Any]


Event = Begun | Stepped | Ended
Tell = Callable[[Event], None]


def carry_out(schedule: Schedule, tell: Tell, *, jobs: int = 1, prepare: Callable[[], None] = lambda: None) -> None:
    """Work on every cell that is left, `jobs` at a time, each with its share of the threads; `prepare` (a module's
    function) is called first in each worker process. A cell that fails does not stop the others.

    Raises OutputError when results cannot be written, CompareError when a worker process is killed.
    """
    if jobs > 1:
        _in_workers(schedule, tell, jobs, prepare)
        return
    while (cell := schedule.take()) is not None:
        tell(Begun(cell))
        found = _attempt(schedule.comparison, cell, tell)
        schedule.finish(cell, found)
        tell(Ended(cell, found))


def _attempt(comparison: Comparison, cell: Cell, tell: Tell) -> dict[str, Any]:
    last = time.monotonic()

    def progress(step: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= STEP_SECONDS:
            last = time.monotonic()
            tell(Stepped(cell, step, loss))

    try:
        return work(comparison, cell, progress)
    except OutputError:
        raise
    except QinitError as error:
        return {"failed": str(error)}
    except torch.OutOfMemoryError as error:
        less = "a smaller --micro-batch or --gradient-checkpointing" if cell.rate is not None else "a shorter --length"
        return {"failed": f"{_words(error)}; give {less}, or --device cpu"}
    except Exception as error:  # a model can break in any way
        return {"failed": _words(error)}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _in_workers(schedule: Schedule, tell: Tell, jobs: int, prepare: Callable[[], None]) -> None:
    context = multiprocessing.get_context("spawn")  # threads and CUDA do not survive a fork
    threads = max(1, torch.get_num_threads() // jobs)
    workers: dict[Any, Any] = {}
    busy: dict[Any, Cell] = {}
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            arguments = (theirs, schedule.comparison, threads, prepare)
            workers[ours] = context.Process(target=_serve, args=arguments, daemon=True)
            workers[ours].start()
            theirs.close()
        while True:
            for connection in workers.keys() - busy.keys():
                if (cell := schedule.take()) is None:
                    break
                connection.send(cell)
                busy[connection] = cell
                tell(Begun(cell))
            if not busy:
                return
            for connection in wait(list(busy)):
                _hear(connection, busy, schedule, tell)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _hear(connection: Any, busy: dict[Any, Cell], schedule: Schedule, tell: Tell) -> None:
    try:
        event = connection.recv()
    except (EOFError, ConnectionError):
        raise CompareError(
            f"{busy[connection].name}: its worker process was killed, for want of memory perhaps; run again with fewer "
            "--jobs, finished cells are kept"
        ) from None
    if isinstance(event, OutputError):
        raise event
    if isinstance(event, Ended):
        del busy[connection]
        schedule.finish(event.cell, event.found)
    tell(event)


def _serve(connection: Connection, comparison: Comparison, threads: int, prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare()
    torch.set_num_threads(threads)
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        try:
            connection.send(Ended(cell, _attempt(comparison, cell, connection.send)))
        except OutputError as error:
            connection.send(error)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and another run must find none of them at work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
