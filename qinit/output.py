"""Where a run's directory goes: checked before the start, filled under a temporary name, renamed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qinit.errors import OutputError
from qinit.report import REPORT_NAME

if TYPE_CHECKING:
    from qinit.plan import Plan


def check_output(plan: Plan, out: Path, overwrite: bool) -> None:
    """Raise OutputError if the result cannot go to `out`: it exists, holds something else, or lacks space."""
    try:
        _check_output(plan, out, overwrite)
    except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError before Python 3.13
        reason = getattr(error, "strerror", error)
        raise OutputError(f"{out}: cannot be looked at ({reason}); choose another place with --out") from None


def _check_output(plan: Plan, out: Path, overwrite: bool) -> None:
    source = plan.checkpoint.directory.resolve()
    if out.resolve() == source or out.resolve() in source.parents or source in out.resolve().parents:
        raise OutputError(f"{out}: is, holds or lies in the source {source}; choose another place with --out")
    if out.exists():
        if not out.is_dir():
            raise OutputError(f"{out}: exists and is no directory; choose another place with --out")
        if any(out.iterdir()):
            if not overwrite:
                raise OutputError(f"{out}: exists; pass --overwrite to replace it, or choose another place with --out")
            if not (out / REPORT_NAME).is_file():
                raise OutputError(
                    f"{out}: exists and has no {REPORT_NAME}, so qinit did not write it and will not replace it; "
                    "choose another place with --out"
                )
    check_space(plan, out)


def check_space(plan: Plan, out: Path) -> None:
    """Raise OutputError if the disk that holds `out` has no room for the result."""
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    needed = plan.base_bytes + plan.adapter_bytes + plan.checkpoint.companion_bytes()
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError(f"{out}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there")


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """Give a temporary directory beside `out`; rename it to `out` on success, remove it on any failure."""
    final = out.resolve()  # `out` may be a link: what it points to is replaced, not the link
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _swap(partial, final)
    except OSError as error:
        where = f": {Path(error.filename).name}" if error.filename else ""
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error}{where}); nothing was left there"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`; an older `final` is put back if that fails, and removed if it succeeds."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
