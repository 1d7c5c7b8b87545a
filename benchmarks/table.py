"""What a result is drawn as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows of words."""

    title: str
    header: list[str]
    rows: list[list[str]]
