"""What a person sees of `qinit compare`: the cells as they end, the forecast, the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qinit_cli.draw import Screen
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from qinit.compare.comparison import Cell, Comparison
    from qinit.compare.schedule import Schedule
    from qinit.compare.workers import Event

WIDEST = 400
START_STEPS = 10  # a start counts as so many steps on the bar


class Board(Screen):
    """Draws a comparison."""

    @contextmanager
    def progress(self, schedule: Schedule) -> Iterator[Callable[[Event], None]]:
        """Give a function that draws what happens: on a bar, or a line for each cell that ends."""
        from qinit.compare.workers import Begun, Ended, Stepped

        comparison = schedule.comparison
        steps = comparison.training.steps if comparison.training else 0

        def size(cell: Cell) -> int:
            return START_STEPS if cell.rate is None else steps

        reused, total = len(schedule.reused), comparison.cells
        if reused:
            self.say(f"{reused} of {total} cells are there from an earlier run")
        terminal = self._console.is_terminal and not self._quiet
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=self._console, disable=not terminal, transient=True)
        whole = sum(START_STEPS for _ in comparison.rows) + steps * (total - len(comparison.rows))
        done, ended, began = sum(map(size, schedule.found)), len(schedule.found), {}
        partial: dict[Cell, int] = {}
        with bar:
            task = bar.add_task("starting", total=whole, completed=done)

            def tell(event: Event) -> None:
                nonlocal done, ended
                match event:
                    case Begun(cell):
                        began[cell] = time.monotonic()
                        bar.update(task, description=cell.name)
                    case Stepped(cell, step, loss):
                        partial[cell] = step
                        description = f"{cell.name}, step {step}: loss {loss:.4f}"
                        bar.update(task, description=description, completed=done + sum(partial.values()))
                    case Ended(cell, found):
                        partial.pop(cell, None)
                        done, ended = done + size(cell), ended + 1
                        bar.update(task, completed=done + sum(partial.values()))
                        line = f"{ended}/{total} {cell.name}: {_words(found)}, {time.monotonic() - began[cell]:.0f} s"
                        if not terminal or "failed" in found:
                            self.say(line)

            yield tell

    def forecast(self, comparison: Comparison, planned: dict[str, Any]) -> None:
        """Draw what is done, what is left and how long that takes."""
        for cell in planned["cells"]:
            self.say(f"{'done' if cell['done'] else 'left'}  {cell['cell']}")
        step = f" ({planned['seconds_per_step']:.3f} s a step)" if planned["seconds_per_step"] else ""
        self.say(f"{planned['left']} of {len(planned['cells'])} cells are left: {planned['words']} here{step}")
        self.say(f"would be written to {comparison.out}")

    def result(self, result: dict[str, Any], places: list[Path]) -> None:
        """Draw the table."""
        from qinit.compare.table import failures, header, lines, title

        if self._quiet:
            return
        self._console.print(title(result), style="italic", soft_wrap=True)
        table = Table(*header(result), box=None, pad_edge=False)
        for cells in lines(result):
            table.add_row(*cells)
        # A line of a file is a row of the table, however long.
        self._console.print(table, width=None if self._console.is_terminal else WIDEST)
        if result["training"] and len(result["seeds"]) > 1:
            self.say("learning rates were swept with the first seed; the others ran at the best one only")
        for line in failures(result):
            self.say(f"failed: {line}")
        self.say(f"written to {', '.join(map(str, places))}")


def _words(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"failed: {found['failed']}"
    if found.get("diverged"):
        return str(found["diverged"])
    words = " / ".join("inf" if value is None else f"{value:.3f}" for value in found["perplexities"])
    return words + (f", validation {found['validation']:.3f}" if found.get("validation") else "")
