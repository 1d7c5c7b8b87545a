"""A finished run, opened to be written in another form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qinit.adapters import ADAPTER_DIRECTORY, WEIGHTS_STEM
from qinit.adapters.reading import SavedAdapter
from qinit.adapters.trained import WEIGHTS_NAME
from qinit.errors import CheckpointError, ReportError
from qinit.files.tensors import read_header
from qinit.formats import format_of
from qinit.report.adapter_card import require_base
from qinit.report.report import Report
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import Architecture, read_architecture
from qinit.stock.skeleton import Skeleton
from qinit.stream.weights import ModelWeights
from qinit.trial.fitting import named_base, open_adapter, require_made_for, require_names
from qinit.workplace.place import require_finished


@dataclass(frozen=True)
class FinishedRun:
    """A run's report and base, and an adapter on it: its own, or one that was trained from it. `weights` reads the
    base's parameters by the names that the model has, packed layers unpacked."""

    directory: Path
    report: Report
    checkpoint: Checkpoint
    architecture: Architecture
    weights: ModelWeights
    adapter_directory: Path
    adapter: SavedAdapter
    notes: tuple[str, ...] = ()  # what a user should know of the adapter

    @property
    def adapter_bytes(self) -> int:
        """What the adapter's file takes."""
        return (self.adapter_directory / f"{WEIGHTS_STEM}.safetensors").stat().st_size

    @property
    def trained(self) -> bool:
        """Whether the adapter is another than the run's own."""
        return self.adapter_directory.resolve() != (self.directory / ADAPTER_DIRECTORY).resolve()

    @classmethod
    def open(cls, directory: Path, adapter: Path | None = None, *, trust_remote_code: bool = False) -> FinishedRun:
        """Open a run's directory, with the adapter in `adapter` in the place of its own.

        Raises ReportError for a run that is unfinished and a directory that is none, an export's too, and
        CheckpointError for what is missing or damaged, and for an adapter that was made for another base.
        """
        require_finished(directory)
        report = Report.read(directory)
        if report.export is not None:
            raise ReportError(f"{directory}: is an export ({report.export.to}); give the run that it was made from")
        require_base(report, directory, "an export is of a run of its own")
        weights, architecture = open_base(directory, trust_remote_code=trust_remote_code)
        own = directory / ADAPTER_DIRECTORY
        note = None
        if adapter is not None:
            settings = open_adapter(adapter)
            skeleton = Skeleton.of(weights.checkpoint, trust_remote_code)
            require_names(adapter, settings, read_header(adapter / WEIGHTS_NAME), skeleton)
            note = require_made_for(adapter, settings, directory, named_base(own), report.source.get("model"))
        place = adapter or own
        saved = SavedAdapter.open(place, whole=True)
        notes = (note,) if note else ()
        return cls(directory, report, weights.checkpoint, architecture, weights, place, saved, notes)


def open_base(directory: Path, *, trust_remote_code: bool = False) -> tuple[ModelWeights, Architecture]:
    """Open the base of a run. Raises CheckpointError for what is missing, damaged or packed by another program."""
    checkpoint = Checkpoint.open(directory, quantized=True)
    fmt = format_of(checkpoint.config)
    problem = "a form that is not qinit's" if fmt is None else fmt.cannot_read(checkpoint.config)
    if problem:
        raise CheckpointError(f"{directory}: its weights are packed as {problem}; qinit did not write it")
    architecture = read_architecture(checkpoint, trust_remote_code)
    return ModelWeights(checkpoint, architecture, trust_remote_code=trust_remote_code), architecture
