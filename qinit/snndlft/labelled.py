"""Labelled text as GLUE has it: a row each, one or two columns of text, one with the class."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinit.errors import DatasetError, did_you_mean
from qinit.files.reading import parse_json
from qinit.text.documents import is_jsonl, read_text

MOST_CLASSES = 1000


@dataclass(frozen=True)
class Labelled:
    """`texts` has a tuple of one or two texts for each row, `labels` the number of its class in `classes`."""

    texts: list[tuple[str, ...]]
    labels: list[int]
    classes: tuple[str, ...]


def read_labelled(file: Path, columns: Sequence[str], label: str, classes: Sequence[str] | None = None) -> Labelled:
    """Read a .csv, .tsv or .jsonl file. `classes` are those of the data trained on, None: the ones found here, in
    order.

    Raises DatasetError, naming file, row and column, for columns that are not there and for labels that are no classes.
    """
    rows = _rows(file)
    texts, found = [], []
    for where, values in rows:
        _require_columns(where, values, (*columns, label))
        texts.append(tuple(_text(where, values, column) for column in columns))
        found.append(_label(where, values, label))
    known = tuple(classes) if classes is not None else _classes(file, label, found)
    numbers = {name: number for number, name in enumerate(known)}
    for (where, _), name in zip(rows, found, strict=True):
        if name not in numbers:
            raise DatasetError(f"{where}: class '{name}' is not among those that are trained ({', '.join(known[:8])})")
    return Labelled(texts, [numbers[name] for name in found], known)


def _require_columns(where: str, values: dict[str, Any], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in values:
            found, hint = ", ".join(map(str, values)) or "none", did_you_mean(column, map(str, values))
            raise DatasetError(f"{where}: no column '{column}'{hint}; its columns are {found}")


def _text(where: str, values: dict[str, Any], column: str) -> str:
    if not isinstance(values[column], str):
        raise DatasetError(f"{where}: column '{column}' holds {type(values[column]).__name__}, expected text")
    return str(values[column])


def _label(where: str, values: dict[str, Any], label: str) -> str:
    value = values[label]
    if not isinstance(value, str | int | float) or value == "":
        raise DatasetError(f"{where}: column '{label}' holds {value!r}, which is no class; expected a word or a number")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _classes(file: Path, label: str, found: list[str]) -> tuple[str, ...]:
    names = set(found)
    if all(map(_number, names)) and not all(name.strip().lstrip("-").isdecimal() for name in names):
        example = next(name for name in found if not name.strip().lstrip("-").isdecimal())
        raise DatasetError(
            f"{file}: column '{label}' holds numbers such as {example}, which are no classes; only classes are trained"
        )
    if not 2 <= len(names) <= min(MOST_CLASSES, max(2, len(found) // 2)):
        raise DatasetError(
            f"{file}: column '{label}' has {len(names)} different values in {len(found)} rows, which are no classes; "
            f"expected 2 to {MOST_CLASSES}, each some times; name another column"
        )
    return tuple(sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return each row with the words for where it is."""
    text = read_text(file)
    if is_jsonl(file):
        return _json_rows(file, text)
    if file.suffix.lower() not in (".csv", ".tsv"):
        raise DatasetError(f"{file}: expected a .csv, .tsv or .jsonl file with a column of classes")
    tabs = file.suffix.lower() == ".tsv"
    # GLUE's .tsv files have quotes in their sentences that quote nothing.
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}
    try:
        rows = [
            (f"{file}, row {number}", row)
            for number, row in enumerate(csv.DictReader(io.StringIO(text), strict=True, **style), 1)
        ]
    except csv.Error as error:
        raise DatasetError(f"{file}: cannot be read as {file.suffix[1:]} ({error})") from None
    for where, row in rows:
        if None in row or None in row.values():
            raise DatasetError(f"{where}: has another number of columns than the first line, which names them")
    if not rows:
        raise DatasetError(f"{file}: has no rows below the names of its columns")
    return rows


def _json_rows(file: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                row = parse_json(line.encode())
            except ValueError as error:
                raise DatasetError(f"{where}: not valid JSON ({error}); expected one object per line") from None
            if not isinstance(row, dict):
                raise DatasetError(f"{where}: expected an object, found {type(row).__name__}")
            rows.append((where, row))
    return rows
