"""What a training is on, and how fast: the same for every trainer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinit.errors import RecipeError
from qinit.files.reading import printable

RATE = 1e-4
FILES = (".json", ".jsonl")


@dataclass(frozen=True)
class Training:
    """A data set, either a `file` of JSON Lines or, by its `name`, one of the Hub; the learning rate; and whether it is
    in bfloat16, as on a GPU, where a file says so itself."""

    name: str
    file: Path | None = None
    rate: float = RATE
    bf16: bool = True

    @classmethod
    def on(cls, name: str, rate: float = RATE, *, bf16: bool = True) -> Training:
        """Take a name for what it is: a file by its ending or because it is there, a folder that is there, read
        as one of the Hub is, or else one of the Hub. Raises RecipeError for what cannot be written into a file."""
        path = Path(name)
        is_file = path.suffix in FILES or path.is_file()
        place = str(path.resolve()) if is_file or path.is_dir() else name
        found = cls(place, path.resolve() if is_file else None, rate, bf16)
        if printable(found.name) != found.name:
            raise RecipeError(f"{printable(name)}: a name that cannot be printed cannot be written; rename it")
        return found

    @property
    def rows(self) -> str:
        """The call of `load_dataset` that reads it, in Python."""
        name = json.dumps(self.name, ensure_ascii=False)
        source = f'"json", data_files={name}' if self.file is not None else name
        return f'load_dataset({source}, split="train")'

    @property
    def python_rate(self) -> str:
        digits, _, power = f"{self.rate:e}".partition("e")
        return f"{float(digits):g}e{int(power)}"

    @property
    def yaml_rate(self) -> str:
        """The rate with the point that makes it a number in YAML."""
        digits, _, power = self.python_rate.partition("e")
        return f"{digits if '.' in digits else digits + '.0'}e{power if power[0] == '-' else '+' + power}"


def compared_rate(results: Any, where: str, method: str, bits: int) -> float:
    """Return the learning rate that a comparison (`qinit compare --json`) chose for a method at a width.

    Raises RecipeError where it has no such row, or is no comparison.
    """
    rows = results.get("rows") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "rate" in row for row in rows):
        raise RecipeError(f"{where}: expected what `qinit compare --json` prints")
    found = {(row.get("method"), row.get("bits")): row["rate"] for row in rows if isinstance(row["rate"], float)}
    if (method, bits) not in found:
        there = ", ".join(f"{name} at {width}" for name, width in found)
        raise RecipeError(f"{where}: compares no {method} at {bits} bits; there are {there}")
    return float(found[method, bits])
