"""Writes an export beside its place, with card, report and sums, and renames it when it is whole."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qinit.errors import OutputError, RecipeError, did_you_mean
from qinit.exports import EXPORTS
from qinit.exports.base import Export
from qinit.exports.finished import FinishedRun
from qinit.files.manifest import write_manifest
from qinit.report.exported import write_export_card
from qinit.report.report import Exported


def export_named(name: str) -> Export[Any]:
    """Return an export by its name. Raises RecipeError for one that there is not."""
    if name not in EXPORTS:
        raise RecipeError(f"--to: no '{name}'{did_you_mean(name, EXPORTS)}; known are {', '.join(EXPORTS)}")
    return EXPORTS[name]


def export(run: FinishedRun, to: str, out: Path, *, requantize: bool = False) -> str | None:
    """Write a finished run at `out` in the form `to`; nothing is there before it is whole. Returns what of the run's Q
    that form does not hold to the last bit, None where it holds all.

    Raises RecipeError for a form that there is not, that cannot hold the run, or that loses something where
    `requantize` does not allow it, and OutputError for a place that is taken, too small or cannot be written to.
    """
    form = export_named(to)
    if problem := form.cannot_hold(run):
        raise RecipeError(f"--to {to}: {problem}")
    if (lost := form.loses(run)) and not requantize:
        raise _lossy(to, lost)
    final = out.resolve()
    partial = final.with_name(f".{final.name}.partial")
    if out.exists():
        raise OutputError(f"{out}: exists; choose another place with --out")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        layout = form.layout(run)
        needed, free = form.nbytes(run, layout), shutil.disk_usage(partial).free
        if needed > free:
            raise OutputError(f"{out}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there")
        found = form.write(run, layout, partial, final)
        if found is not None and not requantize:
            raise _lossy(to, found)
        lost = "; ".join(filter(None, (lost, found))) or None
        _describe(run, form, lost, partial)
        partial.rename(final)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return lost


def _lossy(to: str, lost: str) -> RecipeError:
    return RecipeError(f"--to {to}: {lost}; --requantize writes it all the same")


def _describe(run: FinishedRun, form: Export[Any], lost: str | None, directory: Path) -> None:
    """Write what every export has: the run's report with what was made of it, a card, and the list of all sums."""
    report = replace(run.report, export=Exported(form.name, form.reader, run.trained, lost))
    report.write(directory)
    metadata = run.checkpoint.card_metadata()
    write_export_card(directory, report, metadata, library=form.library, tags=form.tags, load=form.load(report))
    write_manifest(directory)
