"""Generators that yield how far they are and return a result."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Step = TypeVar("Step")
Told = TypeVar("Told")
Result = TypeVar("Result")


def told(steps: Generator[Step, None, Result], tell: Callable[[Step], Told]) -> Generator[Told, None, Result]:
    """Yield what `tell` makes of each step, and return the result."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        yield tell(step)


def finish(steps: Generator[Step, None, Result]) -> Result:
    """Run a generator to its end and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
