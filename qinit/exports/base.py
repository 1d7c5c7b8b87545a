"""What every export offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

from qinit.exports.finished import FinishedRun
from qinit.exports.reread import Reread
from qinit.report.report import Report

Layout = TypeVar("Layout")


class Export(ABC, Generic[Layout]):
    """A form that another program reads. Stateless: what it has found out about a run is its layout there."""

    name: str
    reader: str  # the program that reads it, for people
    library = "transformers"  # the library that the Hub shows it with,
    tags: tuple[str, ...] = ()  # and under what, beside the form's name

    def cannot_hold(self, run: FinishedRun) -> str | None:
        """Return why this form cannot hold the run at all, or None."""
        return None

    def loses(self, run: FinishedRun) -> str | None:
        """Return what of the run's Q this form does not hold to the last bit, or None; by grids alone, as it is asked
        before anything is written."""
        return None

    def load(self, report: Report) -> str:
        """Return the part of the card on how it is loaded, from within its directory: Markdown."""
        return f"It is read by {self.reader}."

    def reread(self, directory: Path, report: Report, *, trust_remote_code: bool) -> Reread | None:
        """Open what `write` wrote, to be verified; None where its hashes alone are. Raises CheckpointError for what is
        missing or damaged."""
        return None

    @abstractmethod
    def layout(self, run: FinishedRun) -> Layout:
        """Return what stands where, without reading codes. It is made once."""

    @abstractmethod
    def nbytes(self, run: FinishedRun, layout: Layout) -> int:
        """Return how many bytes `write` writes, at least."""

    @abstractmethod
    def write(self, run: FinishedRun, layout: Layout, directory: Path, out: Path) -> str | None:
        """Write base and adapter into a directory that is empty, one tensor in memory at a time; `out` is the place
        that the directory is moved to. Returns what of the run's Q is not held, where only its codes say it."""
