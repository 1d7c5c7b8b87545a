"""What a verification yields: how far it is, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinit.errors import QinitError


@dataclass(frozen=True)
class Stage:
    """A pass over the run begins; `nbytes` is what it will read."""

    what: str
    nbytes: int


@dataclass(frozen=True)
class Checked:
    """A file, a tensor or a layer has been read; `kind` says which."""

    kind: str
    name: str
    nbytes: int


@dataclass(frozen=True)
class Finding:
    """Something about a file (relative to the run's directory): wrong, or only to be known where it is not `grave`.

    `expected` and `found` are left out where `what` says it all. `moved`: the adapter names another place as its base.
    """

    file: str
    what: str
    expected: Any = None
    found: Any = None
    grave: bool = True
    moved: bool = False

    def __str__(self) -> str:
        if self.expected is None and self.found is None:
            return f"{self.file}: {self.what}"
        return f"{self.file}: {self.what}: expected {_words(self.expected)}, found {_words(self.found)}"


Event = Stage | Checked | Finding


def from_error(directory: Path, file: str, error: QinitError) -> Finding:
    """Return what a reader of `file` complained of, without the path that its message begins with."""
    return Finding(file, str(error).removeprefix(f"{directory / file}: ").removeprefix(f"{directory}: "))


def _words(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
