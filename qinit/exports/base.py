"""What every export offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from qinit.exports.finished import FinishedRun
from qinit.report.report import Report


class Export(ABC):
    """A form that another program reads. Stateless."""

    name: str
    reader: str  # the program that reads it, for people
    library = "transformers"  # the library that the Hub shows it with,
    tags: tuple[str, ...] = ()  # and under what, beside the form's name

    def cannot_hold(self, run: FinishedRun) -> str | None:
        """Return why this form cannot hold the run at all, or None."""
        return None

    def loses(self, run: FinishedRun) -> str | None:
        """Return what of the run's Q this form does not hold to the last bit, or None."""
        return None

    def load(self, report: Report) -> str:
        """Return the part of the card on how it is loaded, from within its directory: Markdown."""
        return f"It is read by {self.reader}."

    @abstractmethod
    def nbytes(self, run: FinishedRun) -> int:
        """Return how many bytes `write` writes, at least."""

    @abstractmethod
    def write(self, run: FinishedRun, directory: Path, out: Path) -> None:
        """Write base and adapter into a directory that is empty, one tensor in memory at a time; `out` is the place
        that the directory is moved to."""
