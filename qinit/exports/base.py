"""What every export offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from qinit.exports.finished import FinishedRun


class Export(ABC):
    """A form that another program reads. Stateless."""

    name: str
    reader: str  # the program that reads it, for people

    def cannot_hold(self, run: FinishedRun) -> str | None:
        """Return why this form cannot hold the run at all, or None."""
        return None

    def loses(self, run: FinishedRun) -> str | None:
        """Return what of the run's Q this form does not hold to the last bit, or None."""
        return None

    @abstractmethod
    def nbytes(self, run: FinishedRun) -> int:
        """Return how many bytes `write` writes, at least."""

    @abstractmethod
    def write(self, run: FinishedRun, directory: Path, out: Path) -> None:
        """Write base and adapter into a directory that is empty, one tensor in memory at a time; `out` is the place
        that the directory is moved to."""
