"""Writes an export beside its place, and renames it when it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from qinit.errors import OutputError, RecipeError, did_you_mean
from qinit.exports import EXPORTS
from qinit.exports.finished import FinishedRun


def export(run: FinishedRun, to: str, out: Path) -> None:
    """Write a finished run at `out` in the form `to`; nothing is there before it is whole.

    Raises RecipeError for a form that there is not, or that cannot hold the run, and OutputError for a place that is
    taken or cannot be written to.
    """
    if to not in EXPORTS:
        raise RecipeError(f"--to: no '{to}'{did_you_mean(to, EXPORTS)}; known are {', '.join(EXPORTS)}")
    if problem := EXPORTS[to].cannot_hold(run):
        raise RecipeError(f"--to {to}: {problem}")
    final = out.resolve()
    partial = final.with_name(f".{final.name}.partial")
    if out.exists():
        raise OutputError(f"{out}: exists; choose another place with --out")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        EXPORTS[to].write(run, partial, final)
        partial.rename(final)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
