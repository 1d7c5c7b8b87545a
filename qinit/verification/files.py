"""The files against SHA256SUMS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qinit.errors import ReportError
from qinit.files.manifest import MANIFEST_NAME, file_sum, listed, read_manifest
from qinit.verification.findings import Checked, Event, Finding, Stage, from_error


def check_files(directory: Path) -> Iterator[Event]:
    """Hash every file that is listed, and name those that are missing, differ or are not listed."""
    there = listed(directory)
    if not (directory / MANIFEST_NAME).is_file():
        what = "is not there (an older qinit wrote none), so no hash can be checked"
        yield Finding(MANIFEST_NAME, what, grave=False)
        return
    try:
        sums = read_manifest(directory)
    except ReportError as error:
        yield from_error(directory, MANIFEST_NAME, error)
        return
    missing = sums.keys() - there
    sizes = {name: (directory / name).stat().st_size for name in there if name in sums}
    yield Stage("hashes", sum(sizes.values()))
    for name, expected in sums.items():
        if name in missing:
            yield Finding(name, f"is missing, but {MANIFEST_NAME} lists it")
            continue
        try:
            found = file_sum(directory / name)
        except OSError as error:
            yield Finding(name, f"cannot be read ({error.strerror})")
            continue
        if found != expected:
            yield Finding(name, "has changed since it was written: SHA-256", expected, found)
        yield Checked("file", name, sizes[name])
    for name in there:
        if name not in sums:
            yield Finding(name, f"is not listed in {MANIFEST_NAME}: qinit did not write it with the run", grave=False)
