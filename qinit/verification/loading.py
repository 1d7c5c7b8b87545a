"""A run as stock transformers and PEFT load it, tried in a process of its own: whole where it fits, else by names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qinit.adapters import ADAPTER_DIRECTORY
from qinit.adapters.trained import WEIGHTS_NAME
from qinit.files.tensors import read_header
from qinit.formats import format_of
from qinit.hub.download import local_directory
from qinit.machine import free_memory
from qinit.report.adapter_card import is_adapter
from qinit.report.report import Report
from qinit.requirements import pip_command
from qinit.source.checkpoint import Checkpoint
from qinit.trial.asked import Asked
from qinit.trial.child import answers
from qinit.verification.factors import WEIGHTS_FILE
from qinit.verification.findings import Checked, Event, Finding, Stage
from qinit.verification.written import CONFIG

SHARE = 0.8  # of the free memory


def check_loading(
    directory: Path,
    adapter: Path | None = None,
    source: Path | None = None,
    *,
    deep: bool = False,
    trust_remote_code: bool = False,
) -> Iterator[Event]:
    """Load a sound run with the stock classes, and its own or another adapter, and compare what it predicts with what
    its files say; `deep` does so block by block where memory does not hold the whole.

    Raises QinitError for what is no run."""
    import torch

    report = Report.read(directory)
    place, base = directory / ADAPTER_DIRECTORY, directory
    if is_adapter(report):
        place, base = directory, local_directory(str(report.totals["base"]["name"]))
    own = adapter is None or adapter.resolve() == place.resolve()
    factors = adapter or place
    checkpoint = Checkpoint.open(base, quantized=True)
    how = "whole"
    needed, free = _needed(report, checkpoint, factors), SHARE * free_memory(torch.device("cpu"))
    if (fmt := format_of(checkpoint.config)) is not None and (missing := fmt.missing_packages()):
        how = "names"
        what = f"{' and '.join(missing)} not installed, so the run was not loaded, only its names compared with those "
        yield Finding(CONFIG, f"{what}that the loaders look for; {pip_command(missing)}", grave=False)
    elif needed > free:
        how = "blocks" if deep else "meta"
        sizes = f"it takes {needed / 1e9:.1f} GB to run, and {free / 1e9:.1f} GB are free"
        if not deep:
            yield Finding(CONFIG, f"{sizes}: loaded without weights; --deep compares block by block", grave=False)
    recorded = Path(str(report.source.get("model")))
    known = source or (recorded if (recorded / CONFIG).is_file() else None)
    asked = Asked(
        str(base.resolve()),
        str(factors.resolve()),
        report.loader,
        how,
        None if known is None else str(known.resolve()),
        trust_remote_code,
    )
    yield Stage("loading it", 0)
    for answer in answers(asked):
        if answer.kind == "done":
            yield Checked("loaded", answer.what, 0)
        else:
            file = CONFIG if answer.part == "base" else WEIGHTS_FILE if own else str(factors / WEIGHTS_NAME)
            yield Finding(file, answer.what, grave=answer.grave)


def _needed(report: Report, checkpoint: Checkpoint, adapter: Path) -> int:
    """Return what a pass takes: what is stored, all weights in float32, factors with their gradients."""
    weights = {row.name: row.shape[0] * row.shape[1] for row in report.layers if row.kept is None}
    others = sum(tensor.numel for name, tensor in checkpoint.tensors.items() if not _is_packed(name, checkpoint.config))
    factors = sum(tensor.nbytes for tensor in read_header(adapter / WEIGHTS_NAME).values())
    return checkpoint.weight_bytes + 4 * (sum(weights.values()) + others) + 3 * factors


def _is_packed(name: str, config: dict[str, Any]) -> bool:
    fmt = format_of(config)
    return fmt is not None and name.rpartition(".")[2] in fmt.parts
