"""An export reread: hashes, structure, finite values; with the run that it was made from every value of Q and s B A."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from qinit.errors import CheckpointError, QinitError
from qinit.exports import FinishedRun
from qinit.exports.reread import Reread
from qinit.exports.write import export_named
from qinit.files.manifest import MANIFEST_NAME
from qinit.files.tensors import StoredTensor
from qinit.linalg.chunks import row_chunks
from qinit.report.report import REPORT_NAME, Report
from qinit.source.checkpoint import count_nonfinite
from qinit.verification.files import check_files
from qinit.verification.findings import Checked, Event, Finding, Stage, from_error
from qinit.verification.written import relative

CPU = torch.device("cpu")
ROUNDED = 2**-10  # of a value: what a reader rounds to float16 once or twice
TINY = 1e-7  # float16 has nothing smaller
LOST = 0.05  # of a tensor's norm, where the export says that it loses something
SUMS = 1e-5  # of the norm of s B A: its scale may be folded into B


def verify_export(
    directory: Path, run: Path | None = None, adapter: Path | None = None, *, trust_remote_code: bool = False
) -> Iterator[Event]:
    """Check the directory of an export; with `run`, which it was made from, and the `adapter` where that was another
    than the run's own, every value too. One tensor is in memory at a time.

    Raises ReportError for a directory that is no export, CheckpointError where run and adapter cannot be read.
    """
    report = Report.read(directory)
    assert report.export is not None
    original = None if run is None else FinishedRun.open(run, adapter, trust_remote_code=trust_remote_code)
    yield from check_files(directory)
    try:
        form = export_named(report.export.to)
        found = form.reread(directory, report, trust_remote_code=trust_remote_code)
    except QinitError as error:
        yield from_error(directory, REPORT_NAME, error)
        return
    if found is None:
        what = f"{form.name} is not read back: its files were compared with {MANIFEST_NAME} alone"
        yield Finding(REPORT_NAME, what, grave=False)
        return
    yield Stage("values", sum(tensor.nbytes for tensor in found.tensors.values()))
    for tensor in found.tensors.values():
        yield from _check_finite(directory, tensor)
    if original is None:
        for row in report.layers:
            yield from _guarded(directory, _check_layer(found, row.name, row.shape))
        return
    if original.report.layers != report.layers:
        yield Finding(REPORT_NAME, f"is an export of another run than {run}")
        return
    trained = report.export.trained and adapter is None
    if trained:
        yield Finding(REPORT_NAME, "holds a trained adapter, which was not given: the base was compared", grave=False)
    yield from _guarded(directory, _check_values(found, original, report.export.lost is not None))
    if not trained:
        yield from _guarded(directory, _check_factors(found, original))


def _guarded(directory: Path, events: Iterator[Event]) -> Iterator[Event]:
    """Make a finding of a file of the export that cannot be read to its end; the run's is an error."""
    try:
        yield from events
    except CheckpointError as error:
        file = Path(str(error).partition(": ")[0])
        if file.is_absolute() and not file.is_relative_to(directory.absolute()):
            raise
        yield from_error(directory, REPORT_NAME, error)


def _check_finite(directory: Path, tensor: StoredTensor) -> Iterator[Event]:
    file = relative(directory, tensor.file)
    try:
        bad = 0
        if tensor.dtype.is_floating_point:
            bad = sum(count_nonfinite(chunk.view(tensor.dtype)) for chunk in tensor.chunks())
    except CheckpointError as error:
        yield from_error(directory, file, error)
        return
    if bad:
        yield Finding(file, f"tensor '{tensor.name}' holds {bad} NaN or Inf among {tensor.numel} values")
    yield Checked("tensor", tensor.name, tensor.nbytes)


def _check_layer(found: Reread, name: str, shape: tuple[int, int]) -> Iterator[Event]:
    """A layer of the report is there, of its shape, with finite values."""
    value = found.value(f"{name}.weight")
    if value is None or tuple(value.shape) not in (tuple(shape), tuple(shape)[::-1]):
        there = None if value is None else list(value.shape)
        yield Finding(REPORT_NAME, f"{name}: shape of its weight in the export", list(shape), there)
    elif bad := count_nonfinite(value):
        yield Finding(REPORT_NAME, f"{name}: {bad} values of its weight in the export are NaN or Inf")
    yield Checked("layer", name, 0)


def _check_values(found: Reread, run: FinishedRun, lossy: bool) -> Iterator[Event]:
    assert run.architecture.naming is not None
    modules = {f"{module.name}.weight" for module in run.architecture.linear}
    for parameter in run.architecture.naming.model.state_dict():
        expected = run.weights.read(parameter, CPU)
        if expected is None:
            continue
        value = found.value(parameter)
        if value is None or value.shape != expected.shape:
            there = None if value is None else list(value.shape)
            if value is not None or run.weights.names.find(parameter) is not None or parameter in modules:
                yield Finding(REPORT_NAME, f"{parameter}: shape in the export", list(expected.shape), there)
            continue
        apart = _distance(value, expected)
        if lossy and apart > LOST:
            yield Finding(REPORT_NAME, f"{parameter}: is {100 * apart:.1f} % away from the run's")
        elif not lossy and (others := _others(value, expected)):
            yield Finding(REPORT_NAME, f"{parameter}: {others} of {value.numel()} values are not the run's")
        if parameter in modules:
            yield Checked("layer", parameter, 0)


def _check_factors(found: Reread, run: FinishedRun) -> Iterator[Event]:
    for name in run.adapter.parts:
        expected, value = run.adapter.change(name, CPU), found.change(name)
        if expected is None:
            continue
        if value is None or value.shape != expected.shape or _distance(value, expected) > SUMS:
            yield Finding(REPORT_NAME, f"{name}: its factors in the export do not give the s B A of the adapter")


def _distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(expected))
    apart = float(torch.linalg.vector_norm(value - expected))
    return apart / norm if norm else apart


def _others(value: torch.Tensor, expected: torch.Tensor) -> int:
    """Return how many values are not the expected ones, but for a rounding."""
    a, b = value.reshape(len(value), -1), expected.reshape(len(expected), -1)
    return sum(int((~torch.isclose(a[rows], b[rows], ROUNDED, TINY)).sum()) for rows in row_chunks(*a.shape))
