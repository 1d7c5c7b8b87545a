"""What a person sees: progress, the plan, the result. Plain lines when the output is no terminal."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qinit.files.reading import printable

if TYPE_CHECKING:
    from qinit.events import Event
    from qinit.plan.plan import Plan
    from qinit.report.report import Report

SPENT_ON = {"bits": "more bits", "group_size": "smaller groups", "rank": "larger ranks"}
SAMPLING = {"self": "the model writes its calibration text", "text": "reading the text that qinit brings"}
METHOD_COLUMNS = {
    **{"name": "method", "calibration": "calibration", "grid": "grid", "bits": "bits", "search": "scales"},
    **{"rounding": "rounding", "metric": "metric", "schedule": "schedule", "source": "source"},
}
START_COLUMNS = {
    **{"name": "start", "calibration": "calibration", "factors": "A and B", "base": "base", "bits": "bits"},
    **{"grids": "grids", "peft": "of PEFT", "source": "source"},
}
FAMILY_COLUMNS = {
    "name": "family",
    "peft": "peft's configuration",
    "changes": "changes",
    "rank": "rank is",
    "source": "source",
}


def words(value: Any) -> str:
    """Say a list as its items."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def size(nbytes: float) -> str:
    """Format bytes in decimal units, as disks and the Hub count them."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def allocation_words(plan: Plan) -> list[str]:
    """Say how the widths, and what else is chosen, were given to the layers."""
    shares = _shares([layer.bits for layer in plan.quantized], "bits")
    words = [f"widths: {shares}; {plan.grid_bits_per_weight:.3f} bits per weight with scales and zero points"]
    if plan.recipe.joint and not plan.pending:
        words.append(f"group sizes: {_shares([layer.group_size for layer in plan.quantized])}")
    if plan.recipe.chooses_ranks and not plan.pending:
        words.append(f"ranks: {_shares([layer.rank for layer in plan.quantized])}")
    if plan.allocation is not None and plan.allocation.chosen is not None:
        ends = ", ".join(f"{nats:.3f} at {bits:.2f}" for bits, nats in plan.allocation.uniform)
        words.append(
            f"predicted loss: {plan.allocation.chosen[1]:.3f} nats over full precision (one width: {ends} bits)"
        )
    if plan.allocation is not None and plan.allocation.prices:
        won = ", ".join(f"{nats:.4f} by {SPENT_ON[what]}" for what, nats in plan.allocation.prices.items())
        words.append(f"a megabyte more would win, in predicted nats: {won}")
    return words


def _shares(values: list[int], unit: str = "") -> str:
    counts = sorted(Counter(values).items())
    return ", ".join(f"{value}{unit and ' ' + unit}: {count} layers" for value, count in counts)


class Screen:
    """Draws on stdout, or on stderr when stdout is kept for JSON."""

    def __init__(self, quiet: bool = False, to_stderr: bool = False):
        self._quiet = quiet
        stream = sys.stderr if to_stderr else sys.stdout
        # Piped output is for files and tools: no wrapping at 80 columns.
        width = None if stream.isatty() else 160
        # Names and paths are shown as they are: "[x]" is no markup, ":x:" no emoji.
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False, width=width)

    def say(self, line: str) -> None:
        if not self._quiet:
            self._console.print(printable(line), soft_wrap=True)

    def progress(self, *, count: bool = False) -> Progress:
        """Return a bar over bytes, or over a `count` of things: on a terminal only, and gone when it is done."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn())
        rest = (MofNCompleteColumn(),) if count else (DownloadColumn(), TimeRemainingColumn())
        terminal = self._console.is_terminal and not self._quiet
        return Progress(*columns, *rest, console=self._console, disable=not terminal, transient=True)

    def follow(self, plan: Plan, events: Generator[Event, None, None], notes: Sequence[str] = ()) -> Report:
        """Draw what is to be known beforehand, the run's progress and its result; returns its report."""
        from qinit.events import (
            Allotted,
            Checking,
            Discarded,
            Done,
            Finished,
            Measuring,
            Noted,
            Passing,
            Reading,
            Resumed,
            Sampling,
            Unchanged,
            Working,
        )
        from qinit.events import Progress as Polishing
        from qinit.words import moment

        for note in notes:
            self.say(f"note: {note}")
        report = None
        terminal = self._console.is_terminal and not self._quiet
        with closing(events), self.progress() as progress:  # closing: an interrupt here also ends the run
            task = progress.add_task("starting", total=plan.bytes_before)
            done = 0
            for event in events:
                match event:
                    case Resumed(layers, total, nbytes, since):
                        done += nbytes
                        progress.advance(task, nbytes)
                        self.say(f"resuming: {layers} of {total} layers were finished (started {moment(since)})")
                    case Discarded(reason):
                        self.say(f"starting anew: {reason}")
                    case Passing(block, blocks):
                        progress.update(task, description=f"block {block + 1} of {blocks}: the text runs through it")
                    case Sampling(source):
                        text = SAMPLING.get(source, f"reading {source}")
                        progress.update(task, description=printable(text))
                    case Measuring(block, blocks, layers):
                        what = f"measuring {layers[0]}" if layers else "none of the chosen layers"
                        progress.update(task, description=printable(f"block {block + 1} of {blocks}: {what}"))
                    case Allotted(allotted):
                        for line in allocation_words(allotted):
                            self.say(line)
                    case Noted(text):
                        self.say(f"note: {text}")
                    case Reading(at, blocks):
                        progress.update(task, description=f"polish: the source reads its text, block {at} of {blocks}")
                    case Polishing(step, loss, held_out):
                        progress.update(task, description=f"polish, step {step}: loss {loss:.4f}")
                        if held_out is not None and not terminal:
                            self.say(f"polish, step {step}: loss {loss:.4f}, held out {held_out:.4f}")
                    case Checking(step, at, total):
                        progress.update(task, description=printable(f"check: {step}, {at} of {total}"))
                    case Working(name):
                        progress.update(task, description=printable(name))
                    case Done(name, nbytes, row):
                        done += nbytes
                        progress.advance(task, nbytes)
                        if row is not None and not terminal:
                            share = f"{100 * done / plan.bytes_before:3.0f}%"
                            result = "kept" if row.error is None else f"error {row.error_start:.4f} -> {row.error:.4f}"
                            if row.output_error is not None:
                                result += f", of the output {row.output_error_start:.4f} -> {row.output_error:.4f}"
                            self.say(f"{share} {name}: {result}, {row.seconds:.2f} s")
                    case Finished(result_report, directory):
                        report = result_report
                        self._result(report, directory)
                    case Unchanged(same_report, directory):
                        report = same_report
                        self.say(f"nothing was gained, so nothing was written: {directory} is as it was")
        assert report is not None
        return report

    def _result(self, report: Report, directory: Path) -> None:
        from qinit.plan.shares import weight_words
        from qinit.report.card import calibration_words, snippet_of
        from qinit.report.check import check_words

        if self._quiet:
            return
        totals = report.totals
        kept = f" (+ {totals['layers_kept']} kept)" if totals["layers_kept"] else ""
        bits = f"{totals['bits_per_weight']:.3f} as stored"
        if totals["bits_per_weight"] != totals["grid_bits_per_weight"]:
            bits += f", {totals['grid_bits_per_weight']:.3f} on the grid"
        after = f"{size(totals['base_bytes'])} base + {size(totals['adapter_bytes'])} adapter"
        disk = f"{size(totals['bytes_before'])} -> {after}" if "base" not in totals else after
        errors = f"{totals['error_start']:.4f} base alone -> {totals['error']:.4f} with the adapter"
        outputs = {}
        if "output_error" in totals:
            start, end = totals["output_error_start"], totals["output_error"]
            outputs["of the outputs"] = f"{start:.4f} base alone -> {end:.4f} with the adapter"
        if "calibration" in totals:
            outputs |= calibration_words(totals["calibration"])
        self.facts(
            f"{report.model}: {totals['nominal_bits']:g} bits, rank {report.recipe['rank']}, {report.method}",
            {
                "layers": f"{totals['layers']}{kept}",
                **weight_words(totals["quantized_weights"], totals["weights"], totals["left"], report.done),
                "bits per weight": bits,
                "weights on disk": disk,
                **(check_words(totals["check"]) if "check" in totals else {}),
                "relative error": errors,
                **outputs,
                "time": f"{totals['seconds']:.1f} s",
                "peak memory": size(totals["peak_memory_bytes"]),
                "written to": str(directory),
            },
        )
        self.say("Load it:")
        for line in snippet_of(report, str(directory)):
            self.say(f"    {line}")

    def methods(self, rows: list[dict[str, Any]]) -> None:
        """Draw the method table."""
        table = Table(*METHOD_COLUMNS.values(), box=None, pad_edge=False)
        table.columns[0].no_wrap = table.columns[-1].no_wrap = True
        for row in rows:
            cells = {**row, "schedule": "; ".join(row["schedule"])}
            table.add_row(*(words(cells[key]) for key in METHOD_COLUMNS))
        self._console.print(table)

    def starts(self, rows: list[dict[str, Any]]) -> None:
        """Draw the table of starts."""
        self._console.print()
        table = Table(*START_COLUMNS.values(), box=None, pad_edge=False)
        table.columns[0].no_wrap = table.columns[-1].no_wrap = True
        for row in rows:
            table.add_row(*(words(row[key]) for key in START_COLUMNS))
        self._console.print(table)
        self.say(f"Trainers that go on from them: {words(rows[0]['trainers'])}.")

    def families(self, rows: list[dict[str, Any]]) -> None:
        """Draw the table of PEFT's other families."""
        self._console.print()
        table = Table(*FAMILY_COLUMNS.values(), box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(words(row[key] or "-") for key in FAMILY_COLUMNS))
        self._console.print(table)
        self.say("Which bases each of them takes is tried when it is written.")

    def report(self, report: Report) -> None:
        """Draw a run's report: a line for each module type, then the totals."""
        from qinit.report.averages import average
        from qinit.report.pictures.contents import NO_FRONT, Grid, bits_words, heading, pareto_front, summary

        if self._quiet:
            return
        fields = ["error_start", "error"]
        columns = ["module type", "layers", "bits", "error, base alone", "with the adapter"]
        if average(report.layers, "output_error") is not None:
            fields += ["output_error_start", "output_error"]
            columns += ["of the output, base alone", "with the adapter"]
        table = Table(*columns, box=None, pad_edge=False)
        grid = Grid(report.layers)
        for kind in grid.kinds:
            rows = [row for cell in grid.of_kind(kind) for row in cell.rows]
            errors = [average(rows, field) for field in fields]
            cells = ["-" if error is None else f"{error:.4f}" for error in errors]
            table.add_row(printable(kind), str(len(rows)), bits_words(rows), *cells)
        self._console.print(table)
        self.facts(heading(report), summary(report))
        if pareto_front(report) is None:
            self.say(f"note: {NO_FRONT}")

    def table(self, *columns: str, rows: Iterable[Sequence[str]]) -> None:
        """Draw rows under these columns."""
        if self._quiet:
            return
        table = Table(*columns, box=None, pad_edge=False, show_header=any(columns))
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def facts(self, title: str, rows: dict[str, str]) -> None:
        """Draw a title and, under it, names with what there is to say of each."""
        if self._quiet:
            return
        self._console.print(
            printable(title), style="italic", soft_wrap=True
        )  # a table's own title is wrapped at its width
        table = Table(show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(printable(name), printable(value))
        self._console.print(table)

    def json_report(self, report: Report, out: Path, **beside: Any) -> None:
        sys.stdout.write(json.dumps({"directory": str(out.resolve()), **report.to_dict(), **beside}) + "\n")
