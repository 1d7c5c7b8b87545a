"""Which cells are left: a row's start, then every learning rate with the first seed, then the best with the others."""

from __future__ import annotations

import shutil
from typing import Any

from qinit.compare.comparison import Cell, Comparison, Row
from qinit.compare.measure import kept_result, ready

Found = dict[Cell, dict[str, Any]]


def best_rate(comparison: Comparison, row: Row, found: Found) -> float | None:
    """Return the learning rate with the lowest perplexity on the validation text; None where no rate has one."""
    swept = {cell.rate: found.get(cell, {}).get("validation") for cell in comparison.sweep(row)}
    values = {rate: value for rate, value in swept.items() if value is not None}
    return min(values, key=values.__getitem__) if values else None


def next_cells(comparison: Comparison, row: Row, found: Found) -> list[Cell]:
    """Return the cells of a row that can be worked on, given what is found; nothing when the row is done."""
    start = Cell(row)
    if start not in found:
        return [start]
    if "failed" in found[start]:
        return []
    left = [cell for cell in comparison.sweep(row) if cell not in found]
    if left:
        return left
    best = best_rate(comparison, row, found)
    return [cell for cell in comparison.repeats(row, best) if cell not in found] if best is not None else []


class Schedule:
    """Hands out cells in the order of the table; `found` holds all results, `reused` those of an earlier run."""

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        self.found: Found = {}
        self._given: set[Cell] = set()
        for row in comparison.rows:
            while known := {
                cell: value
                for cell in next_cells(comparison, row, self.found)
                if (value := kept_result(comparison, cell)) is not None
            }:
                self.found |= known
        self.reused = list(self.found)
        for row in comparison.rows:  # what is left needs the run that it starts from
            if next_cells(comparison, row, self.found) and not ready(comparison, row):
                self.found.pop(Cell(row), None)

    def take(self) -> Cell | None:
        """Return a cell to work on; None when there is none now."""
        for row in self.comparison.rows:
            for cell in next_cells(self.comparison, row, self.found):
                if cell not in self._given:
                    self._given.add(cell)
                    return cell
        return None

    def finish(self, cell: Cell, found: dict[str, Any]) -> None:
        """Note a result; a row's run is removed when nothing is left to do from it."""
        self.found[cell] = found
        done = not next_cells(self.comparison, cell.row, self.found)
        failed = any("failed" in value for one, value in self.found.items() if one.row == cell.row)
        if done and not failed and cell.row.run is None and not self.comparison.keep_runs:
            shutil.rmtree(self.comparison.run_directory(cell.row), ignore_errors=True)
