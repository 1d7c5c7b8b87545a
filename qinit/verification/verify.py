"""Rereads what a run wrote, and says what is no longer as it was written or as its report says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qinit.errors import ReportError
from qinit.files.manifest import MANIFEST_NAME
from qinit.report.report import REPORT_NAME, Report
from qinit.source.checkpoint import Checkpoint
from qinit.verification.exported import verify_export
from qinit.verification.factors import check_adapter
from qinit.verification.files import check_files
from qinit.verification.findings import Event
from qinit.verification.repair import check_repair, repaired_base
from qinit.verification.values import check_values
from qinit.verification.written import open_written


def verify(directory: Path, source: Path | None = None, *, trust_remote_code: bool = False) -> Iterator[Event]:
    """Check a run's directory: hashes, structure, values, and with `source`, the model it was made from, the errors; of
    an export, whose source is its run, that it holds the same.
    What loaders make of it: `qinit.verification.loading`.

    Yields Stage and Checked as it goes, and a Finding for everything that is not as it should be. One layer is in
    memory at a time. `trust_remote_code` runs code that lies there. Raises ReportError if `directory` is none of
    qinit's, CheckpointError if the source cannot be read.
    """
    if not (directory / REPORT_NAME).exists() and not (directory / MANIFEST_NAME).exists():
        what = f"has neither {REPORT_NAME} nor {MANIFEST_NAME}" if directory.is_dir() else "no such directory"
        raise ReportError(f"{directory}: {what}; pass the directory that `qinit eqft` wrote")
    if exported(directory) is not None:
        yield from verify_export(directory, source, trust_remote_code=trust_remote_code)
        return
    base = repaired_base(directory)
    own = base is not None and source is not None and Path(base).resolve() == source.resolve()  # a start on that base
    original = Checkpoint.open(source, quantized=own) if source is not None else None
    yield from check_files(directory)
    if base is not None:
        yield from check_repair(directory, base, source, trust_remote_code=trust_remote_code)
        return
    written = yield from open_written(directory, trust_remote_code=trust_remote_code)
    if written is not None:
        factors = yield from check_adapter(written)
        yield from check_values(written, factors, original)


def exported(directory: Path) -> str | None:
    """Return the form of an export, None for a run, and for what has no report that can be read."""
    try:
        report = Report.read(directory)
    except ReportError:
        return None
    return None if report.export is None else report.export.to
