"""Where a run's directory goes: checked before the start, filled beside the target, renamed at the end.

Beside the target NAME lies `.NAME.partial` while a run is unfinished: `run`, which becomes NAME, the journal, the lock
and what only the run needs. It stays there when the run ends early with something worth keeping.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qinit.adapters.trained import WEIGHTS_NAME as ADAPTER_FILE
from qinit.errors import FullError, HubError, LostError, OutputError, QinitError, ReportError
from qinit.files.manifest import file_sum, read_manifest, some_of, strangers
from qinit.plan.plan import Plan
from qinit.planner.memory import polish_disk_bytes, scratch_bytes
from qinit.report.pictures.files import PICTURES
from qinit.report.report import REPORT_NAME
from qinit.workplace.journal import kept_words
from qinit.workplace.lock import locked

NOTHING = "nothing was left there"
LOCK_NAME = "lock"


def check_output(plan: Plan, out: Path, overwrite: bool) -> None:
    """Raise OutputError if the result cannot go to `out`: it exists, holds something else, or lacks space, or if what
    the result says of itself could not be written."""
    try:
        _require_text(plan, out)
        _check_output(plan, out, overwrite)
    except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError before Python 3.13
        reason = getattr(error, "strerror", error)
        raise OutputError(f"{out}: cannot be looked at ({reason}); choose another place with --out") from None


def _check_output(plan: Plan, out: Path, overwrite: bool) -> None:
    models = {"source": plan.checkpoint} | ({} if plan.given is None else {"base": plan.given.checkpoint})
    for what, checkpoint in models.items():
        place = checkpoint.directory.resolve()
        if out.resolve() == place or out.resolve() in place.parents or place in out.resolve().parents:
            raise OutputError(f"{out}: is, holds or lies in the {what} {place}; choose another place with --out")
    require_replaceable(out, overwrite)
    check_space(plan, out)


def require_replaceable(out: Path, overwrite: bool) -> None:
    """Raise OutputError if something lies at `out` that a result may not take the place of."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: exists and is no directory; choose another place with --out")
    if any(out.iterdir()):
        if not overwrite:
            raise OutputError(f"{out}: exists; pass --overwrite to replace it, or choose another place with --out")
        if not (out / REPORT_NAME).is_file():
            raise OutputError(
                f"{out}: exists and has no {REPORT_NAME}, so qinit did not write it and will not replace it; choose "
                "another place with --out"
            )
        _require_own(out)


def _require_own(out: Path) -> None:
    """Raise OutputError for what is not as qinit left it: a file that it did not write, an adapter that was trained."""
    try:
        sums = read_manifest(out)
    except ReportError as error:
        raise OutputError(
            f"{error}: what in {out} is not qinit's own cannot be told, so it is not replaced; remove it, or choose "
            "another place with --out"
        ) from None
    if others := strangers(out, {*sums, *PICTURES}):
        raise OutputError(
            f"{out}: holds what qinit did not write and what would be lost: {some_of(others)}; move it elsewhere, or "
            "choose another place with --out"
        )
    for name in sums:
        file = out / name
        if file.name == ADAPTER_FILE and file.is_file() and file_sum(file) != sums[name]:
            raise OutputError(
                f"{file}: was changed since qinit wrote it, so the adapter was trained or replaced, and would be lost; "
                "move it elsewhere, or choose another place with --out"
            )


def _require_text(plan: Plan, out: Path) -> None:
    """The adapter names `out`, the report the recipe, and both files are UTF-8."""
    found = {"--out": str(out.resolve()), "the model": plan.model_name}
    found |= {key: value for key, value in plan.recipe.model_dump().items() if isinstance(value, str)}
    for what, text in found.items():
        if text.encode(errors="replace").decode() != text:
            raise OutputError(
                f"{out}: {what} is {text!r}, which is not UTF-8, so that the result's own files could not name it; "
                "give it another name"
            )


def check_free(out: Path, *sources: Path) -> None:
    """Raise OutputError if something is at `out` already, or if it is, holds or lies in one of the directories that are
    read."""
    try:
        place = out.resolve()
        for source in (each.resolve() for each in sources):
            if place == source or place in source.parents or source in place.parents:
                raise OutputError(
                    f"{out}: is, holds or lies in {source}, which is read; choose another place with --out"
                )
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise OutputError(f"{out}: exists; remove it, or choose another place with --out")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", error)
        raise OutputError(f"{out}: cannot be looked at ({reason}); choose another place with --out") from None


def check_space(plan: Plan, out: Path) -> None:
    """Raise OutputError if the disk that holds `out` has no room for the result and for hidden states that memory does
    not hold. What an unfinished run has written there counts as room: it is gone on with, or removed."""
    require_space(_needed(plan), out)


def require_space(needed: int, out: Path) -> None:
    """Raise OutputError if the disk that holds `out` has no room for so many bytes; what an unfinished run has written
    there counts as room."""
    free = shutil.disk_usage(_existing(out)).free + _occupied(partial_of(out))
    if needed > free:
        raise OutputError(f"{out}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there")


def partial_of(out: Path) -> Path:
    """Return the directory of an unfinished run for `out`, whether there is one or not."""
    final = out.resolve()  # `out` may be a link: what it points to is replaced, not the link
    return final.with_name(f".{final.name}.partial")


def kept(out: Path) -> str:
    """Say what an unfinished run has left beside `out` and how to go on; an empty string where that is nothing."""
    words = kept_words(partial_of(out) / "journal")
    return f"{words}, the same command goes on from there" if words else ""


def require_finished(run: Path) -> None:
    """Raise ReportError for a run that is not there because it was broken off."""
    if not run.exists() and (left := kept(run)):
        raise ReportError(f"{run}: an unfinished run ({left}); finish it first")


@dataclass(frozen=True)
class Workplace:
    """The directory of an unfinished run, with the lock held."""

    out: Path
    partial: Path

    @property
    def run(self) -> Path:
        """What becomes the result."""
        return self.partial / "run"

    @property
    def journal(self) -> Path:
        return self.partial / "journal"

    @property
    def scratch(self) -> Path:
        """What is of no use to a run that goes on later."""
        return self.partial / "scratch"

    def clear(self) -> None:
        """Remove all that an earlier run has left."""
        self.journal.unlink(missing_ok=True)  # first: without it, nothing else counts
        for path in self.partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink()
        self.scratch.mkdir()

    def finish(self) -> None:
        """Bring everything to disk and put the result in its place, so that not even a reboot leaves half of it."""
        _sync_tree(self.run)
        require_replaceable(self.out, True)  # a file may have come since the start
        final = self.out.resolve()
        _swap(self.run, final)
        _sync(final.parent)


def working(plan: Plan, out: Path, command: str) -> AbstractContextManager[Workplace]:
    """Give a run a place to work in beside `out`, as `working_on` does."""
    return working_on(out, command, lambda: _needed(plan))


@contextmanager
def working_on(out: Path, command: str, needed: Callable[[], int]) -> Iterator[Workplace]:
    """Give a place to work in beside `out`, which no other run works in. It is removed at the end, but for what an
    unfinished run can be gone on with; an error then says so in a note. `needed` says what the result takes on the
    disk, in bytes. Raises OutputError."""
    place = Workplace(out, partial_of(out))
    try:
        if place.partial.is_symlink():
            raise OutputError(f"{place.partial}: is a link, and no directory of qinit's; remove it")
        with locked(place.partial / LOCK_NAME, out, command):
            shutil.rmtree(place.scratch, ignore_errors=True)
            try:
                place.scratch.mkdir()
                yield place
            except BaseException as error:
                shutil.rmtree(place.scratch, ignore_errors=True)
                if _for_good(error) or not kept(out):
                    shutil.rmtree(place.partial, ignore_errors=True)
                elif isinstance(error, Exception) and not isinstance(error, OSError | OutputError):
                    error.add_note(kept(out))
                raise
            shutil.rmtree(place.partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(_words(needed, out, error)) from error


def _for_good(error: BaseException) -> bool:
    """Whether the same command would end in the same error: what the input is to blame for, but not the reading."""
    return isinstance(error, QinitError) and not (
        isinstance(error, OutputError | HubError | LostError | FullError) or isinstance(error.__cause__, OSError)
    )


def _words(needed: Callable[[], int], out: Path, error: OSError) -> str:
    where = f": {Path(error.filename).name}" if error.filename else ""
    left = kept(out)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{out}: cannot be written ({error.strerror or error}{where}); {left or NOTHING}"
    place = _existing(out)
    disk = next(parent for parent in (place, *place.parents) if parent.is_mount())
    missing = needed() - _occupied(partial_of(out))
    free = shutil.disk_usage(place).free
    return (
        f"{out}: cannot be written ({error.strerror}{where}); {left or NOTHING}; the disk at {disk} has "
        f"{free / 1e9:.2f} GB free and the run needs {max(missing, 0) / 1e9:.2f} GB more: make space and start again, "
        "or choose another place with --out"
    )


def _needed(plan: Plan) -> int:
    polished = plan.adapter_bytes + polish_disk_bytes(plan) if plan.recipe.polish else 0
    return plan.written_bytes + polished + scratch_bytes(plan)


def _existing(out: Path) -> Path:
    return next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())


def _occupied(directory: Path) -> int:
    """Return the bytes that a directory's files take on the disk: less than their size where they have holes."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(512 * file.stat().st_blocks for file in files)


def _sync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_back(out: Path) -> None:
    """Put a finished run back to its place, from where a process was killed just as another was to take that place.
    Raises OutputError."""
    final = out.resolve()
    try:
        if not final.exists() and _replaced(final).is_dir():
            _replaced(final).rename(final)
    except OSError as error:
        raise OutputError(f"{out}: lies in {_replaced(final)} and cannot be put back ({error.strerror})") from None


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _swap(run: Path, final: Path) -> None:
    """Rename `run` to `final`; an older `final` is put back if that fails, and removed if it succeeds."""
    replaced = _replaced(final)
    try:
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        run.rename(final)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
