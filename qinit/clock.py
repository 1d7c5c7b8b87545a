"""Where a run's time goes: sections that are told apart while a clock runs, and cost next to nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

OTHER = "other"  # what lies in no section
_SILENT = nullcontext()
_running: Clock | None = None  # by all that carries out a run, and no argument of any of it


class Clock:
    """A context in which `section` counts. The time of a section is its own: that of one within it is not counted
    twice. One clock runs at a time, for one run at a time; where a run is broken off and gone on with, it knows its own
    part of it.

    `timer` returns seconds. They are those of the host: on a GPU, work that was only queued counts where it is waited
    for.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._seconds: dict[str, float] = {}
        self._open = [OTHER]
        self._since = 0.0
        self._before: Clock | None = None

    def __enter__(self) -> Clock:
        global _running
        self._before, _running = _running, self
        self._since = self._timer()
        return self

    def __exit__(self, *_: Any) -> None:
        global _running  # noqa: PLW0603
        self._count()
        _running = self._before

    def split(self) -> dict[str, float]:
        """Return the seconds of each section, the longest first; OTHER is the rest of the clock's time."""
        return dict(sorted(self._seconds.items(), key=lambda item: -item[1]))

    def _count(self) -> None:
        """Give the time since the last call to the section that is open."""
        now = self._timer()
        name = self._open[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


class _Section:
    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock._count()
        self._clock._open.append(self._name)

    def __exit__(self, *_: Any) -> None:
        self._clock._count()
        self._clock._open.pop()


def section(name: str) -> AbstractContextManager[None]:
    """Return a context whose time is counted as `name` by the clock that runs; where none does, it does nothing."""
    return _SILENT if _running is None else _Section(_running, name)


def counted(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that makes a function, no generator, a section."""

    def give(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            with section(name):
                return function(*args, **kwargs)

        return timed

    return give
