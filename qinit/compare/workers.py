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

from qinit.compare.comparison import CELLS, Cell, Comparison
from qinit.compare.measure import work
from qinit.compare.schedule import Schedule
from qinit.errors import CompareError, OutputError, ProcessesError, QinitError
from qinit.machine import versions
from qinit.processes.group import ALONE, Processes
from qinit.runner.several import require_same, require_seen
from qinit.workplace.signature import HASH

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


def carry_out(
    schedule: Schedule,
    tell: Tell,
    *,
    jobs: int = 1,
    prepare: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> None:
    """Work on every cell that is left, `jobs` at a time, each with its share of the threads; `prepare` (a module's
    function) is called first in each worker process. A cell that fails does not stop the others. Of several `processes`
    each works on one cell at a time, and the first has the schedule.

    Raises OutputError when results cannot be written, CompareError when a worker process is killed.
    """
    if processes.several:
        _together(schedule, tell, processes)
        return
    if jobs > 1:
        _in_workers(schedule, tell, jobs, prepare)
        return
    while (cell := schedule.take()) is not None:
        tell(Begun(cell))
        found = _attempt(schedule.comparison, cell, tell)
        schedule.finish(cell, found)
        tell(Ended(cell, found))


def set_out(comparison: Comparison, processes: Processes) -> None:
    """Make sure that several processes compare the same and see what each of them writes. Raises ProcessesError and
    OutputError."""
    if processes.count > comparison.cells:
        raise ProcessesError(
            f"{processes.count} processes for {comparison.cells} cells: some would have nothing to do; start at most "
            f"{comparison.cells}"
        )
    own: dict[str, Any] = {f"version of {name}": version for name, version in versions().items()}
    own["threads (OMP_NUM_THREADS)"] = torch.get_num_threads()
    own["the rows"] = ", ".join(row.name for row in comparison.rows)
    own["what is compared"] = HASH + ",".join(comparison.digest(Cell(row)) for row in comparison.rows)
    require_same(own, processes)
    cells = comparison.out / CELLS
    if processes.first:
        try:
            cells.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{cells}: cannot be written ({error.strerror})") from None
    require_seen(cells, comparison.out, processes)


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


def _together(schedule: Schedule, tell: Tell, processes: Processes) -> None:
    """Work on cells in rounds: each process takes one, and all of them are told to the first before the next round."""

    def next_round() -> list[Cell]:
        taken = (schedule.take() for _ in range(processes.count))
        return [cell for cell in taken if cell is not None]

    while cells := processes.from_first(next_round, "the next cells"):
        found = None
        if processes.rank < len(cells):
            tell(Begun(cells[processes.rank]))
            found = _attempt(schedule.comparison, cells[processes.rank], tell)
        everything = processes.gather(found, "what cells have found")
        if processes.first:
            for cell, one in zip(cells, everything, strict=False):
                schedule.finish(cell, one)
                tell(Ended(cell, one))


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
