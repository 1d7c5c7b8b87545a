"""An adapter that was trained on a run, against the run's base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qinit.adapters.trained import WEIGHTS_NAME, misfits
from qinit.files.tensors import read_header
from qinit.report.report import Report
from qinit.source.checkpoint import count_nonfinite, weight_files
from qinit.verification.findings import Checked, Event, Finding


def check_trained(directory: Path, adapter: Path) -> Iterator[Event]:
    """Check an adapter that was trained on a run: that it fits its base, and that its values are finite.

    Raises CheckpointError for what is no saved adapter, ReportError for what is no run.
    """
    layers = {row.name: row.shape for row in Report.read(directory).layers}
    base = [name for file, _ in weight_files(directory) for name in read_header(file)]
    file = str(adapter / WEIGHTS_NAME)
    yield from (Finding(file, problem) for problem in misfits(adapter, layers, base))
    for name, tensor in read_header(adapter / WEIGHTS_NAME).items():
        if bad := sum(count_nonfinite(chunk.view(tensor.dtype)) for chunk in tensor.chunks()):
            yield Finding(file, f"tensor '{name}' holds {bad} NaN or Inf among {tensor.numel} values")
        yield Checked("tensor", name, tensor.nbytes)
