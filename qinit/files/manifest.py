"""SHA256SUMS of a run's directory: one line for each file, as `sha256sum --check` reads it.

The last line is a comment with the sum of all lines before it, so that damage to the list itself is not taken for
damage to a file that it lists.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from qinit.errors import ReportError
from qinit.files.reading import JSON_BYTES, printable, read_regular

MANIFEST_NAME = "SHA256SUMS"
SHOWN = 5  # names in an error
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_LAST = re.compile(r"# ([0-9a-f]{64})")


def write_manifest(directory: Path) -> None:
    """Hash every file below `directory`, hidden ones left out, and write the list."""
    _write(directory, {name: file_sum(directory / name) for name in listed(directory)})


def refresh(directory: Path, names: Iterable[str]) -> None:
    """Hash these files (relative, with forward slashes) again after they were changed on purpose; all else is believed.

    Does nothing where there is no list. Raises ReportError for a damaged one.
    """
    if (directory / MANIFEST_NAME).is_file():
        _write(directory, {**read_manifest(directory), **{name: file_sum(directory / name) for name in names}})


def read_manifest(directory: Path) -> dict[str, str]:
    """Return the sum of each listed file. Raises ReportError when the list is missing or damaged."""
    path = directory / MANIFEST_NAME
    try:
        text = read_regular(path, JSON_BYTES).decode("utf-8")
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}); qinit writes it beside every run") from None
    except UnicodeDecodeError:
        text = ""
    lines = text.removesuffix("\n").split("\n")
    last = _LAST.fullmatch(lines[-1]) if text.endswith("\n") else None
    found = [_LINE.fullmatch(line) for line in lines[:-1]]
    if last is None or not all(found) or last[1] != _sum_of(lines[:-1]):
        raise ReportError(f"{path}: damaged (its last line is not the sum of the others); it vouches for nothing")
    sums = {match[2]: match[1] for match in found if match}
    wrong = [name for name in sums if not _is_below(name)]
    if wrong or len(sums) != len(found):
        what = f"lists {wrong[0]!r}, which is no file below it" if wrong else "lists a file twice"
        raise ReportError(f"{path}: {what}, so qinit did not write it; it vouches for nothing")
    return sums


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    below = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return below and str(path) == printable(name) == name


def listed(directory: Path) -> list[str]:
    """Return the files below `directory` that the list is about, relative, with forward slashes, sorted."""
    files = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    visible = (file for file in files if not any(part.startswith(".") for part in file.parts))
    return sorted(file.as_posix() for file in visible if file.as_posix() != MANIFEST_NAME)


def strangers(directory: Path, sums: Collection[str]) -> list[str]:
    """Return the names of all below a directory that a list with these names does not have, hidden files and links too:
    relative, with forward slashes, sorted."""
    found = []
    for parent, directories, names in os.walk(directory):
        links = [name for name in directories if Path(parent, name).is_symlink()]
        found += [Path(parent, name).relative_to(directory).as_posix() for name in (*names, *links)]
    return sorted(name for name in found if name not in sums and name != MANIFEST_NAME)


def some_of(names: Sequence[str]) -> str:
    """Say names in an error: the first few, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def manifest_text(sums: dict[str, str]) -> str:
    """Return the list as it is written: what each file's sum is, sorted by name, and the last line."""
    lines = [f"{value}  {name}" for name, value in sorted(sums.items())]
    return "".join(f"{line}\n" for line in [*lines, f"# {_sum_of(lines)}"])


def file_sum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def bytes_sum(content: bytes) -> str:
    """Return what `file_sum` returns for a file with this content."""
    return hashlib.sha256(content).hexdigest()


def _sum_of(lines: list[str]) -> str:
    return bytes_sum("".join(f"{line}\n" for line in lines).encode())


def _write(directory: Path, sums: dict[str, str]) -> None:
    temporary = directory / f".{MANIFEST_NAME}.tmp"
    temporary.write_text(manifest_text(sums), encoding="utf-8")
    temporary.replace(directory / MANIFEST_NAME)
