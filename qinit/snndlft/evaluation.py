"""A trained adapter measured: as `qinit eval` measures any model, or a classifier on labelled rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qinit.adapters import CONFIG_NAME
from qinit.adapters.trained import read_trained
from qinit.errors import ReportError
from qinit.evaluate.subject import Subject
from qinit.recipe_files import SPIKING
from qinit.source.checkpoint import read_json
from qinit.source.vocabulary import Facts

if TYPE_CHECKING:
    from qinit.snndlft.report import SnnReport

OWN = (SPIKING, "ADALORA")  # what `qinit.snndlft.load` loads


@dataclass(frozen=True)
class Scored:
    """A classifier's `value` in its `metric`, over so many labelled rows."""

    metric: str
    value: float
    rows: int


def own_loader(subject: Subject) -> Subject:
    """Return a subject that `qinit.snndlft.load` loads, where its adapter is one of this method; else as it is."""
    adapter = subject.adapter
    if adapter is None or read_json(adapter / CONFIG_NAME, "").get("peft_type") not in OWN:
        return subject

    def loaded(dtype: Any, device: torch.device) -> Any:
        from qinit.snndlft.base import load_for_training
        from qinit.snndlft.model import load

        base, _ = load_for_training(
            subject.base, None, device, dtype=dtype, trust_remote_code=subject.trust_remote_code
        )
        return load(adapter, base)

    return replace(subject, loader=loaded)


def score(directory: Path, report: SnnReport, rows: Path, device: torch.device) -> Scored:
    """Measure a trained classifier on a file of labelled rows with the columns that it was trained with.

    Raises DatasetError for what cannot be read or has other columns or classes, and as `qinit.snndlft.load`.
    """
    from qinit.snndlft.labelled import read_labelled
    from qinit.snndlft.model import base_of, load
    from qinit.snndlft.tasks import to_measure

    data = report.training["data"]
    try:
        columns, label, metric, length = (data[key] for key in ("columns", "label", "metric", "length"))
        found = read_labelled(rows, columns, label, report.classes)
    except (KeyError, TypeError) as error:
        raise ReportError(f"{directory}: its report does not say what was trained on ({error}); train again") from None
    base = base_of(directory, read_trained(directory))
    length = Facts.read(base, read_json(base / "config.json", "")).clip(length)
    task = to_measure(found, directory, length, metric)
    return Scored(metric, task.measure(load(directory, device=str(device))), len(found.labels))
