"""Averages over a report's layers, each weighted by its number of weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from qinit.report.report import LayerRow


def relative_error(rows: tuple[LayerRow, ...], field: str) -> float:
    """The root mean square over layers of a relative error, each weighted by its number of weights."""
    values = [(row.shape[0] * row.shape[1], getattr(row, field)) for row in rows if row.kept is None]
    measured = [(count, value) for count, value in values if value is not None]
    total = sum(count for count, _ in measured)
    return (sum(count * value**2 for count, value in measured) / total) ** 0.5


def places(names: Sequence[str]) -> list[tuple[str, int | None]]:
    """Return each layer's module type and layer number: model.layers.3.mlp.up_proj is mlp.up_proj in layer 3.

    The first number counts layers; later ones (experts) become `*`, those of slices too. Without any, the type is the
    whole name.
    """
    split = [_split(name) for name in names]
    before = sorted({parts for parts, number, _ in split if number is not None})
    ends = zip(before[0], before[-1], strict=False) if len(before) > 1 else ()  # sorted: what they share, all do
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], ends)))
    found: list[tuple[str, int | None]] = []
    for name, (prefix, number, rest) in zip(names, split, strict=True):
        if number is None:
            found.append((name, None))
        elif len(before) == 1 and rest:
            found.append((".".join(rest), number))
        else:
            found.append((".".join((*prefix[shared:], "*", *rest)), number))
    return found


def _split(name: str) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """Return what stands before the first number of a name, the number, and what comes after it."""
    parts = re.sub(r"\[\d+\]$", "[*]", name).split(".")
    for index, part in enumerate(parts):
        if part.isdecimal() and part.isascii() and len(part) < 10:
            rest = ("*" if word.isdecimal() else word for word in parts[index + 1 :])
            return tuple(parts[:index]), int(part), tuple(rest)
    return (name,), None, ()


def average(rows: Sequence[LayerRow], field: str) -> float | None:
    """Return the rows' relative error as `relative_error` has it, None where nothing was measured."""
    measured = any(row.kept is None and getattr(row, field) is not None for row in rows)
    return relative_error(tuple(rows), field) if measured else None


def mean_bits(rows: Sequence[LayerRow]) -> float | None:
    """Return the rows' mean width, each weighted by its number of weights; None where all were kept."""
    pairs = [(row.shape[0] * row.shape[1], row.bits) for row in rows if row.bits is not None]
    return sum(count * bits for count, bits in pairs) / sum(count for count, _ in pairs) if pairs else None
