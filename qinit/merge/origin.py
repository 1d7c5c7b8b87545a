"""Where several adapters come from: the base that all of them are on, and the start that they were trained from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME
from qinit.errors import CheckpointError, HubError, ReportError
from qinit.hub.download import header_directory
from qinit.report.report import REPORT_NAME, Report
from qinit.trial.fitting import BASE_KEY, named_base, require_made_for


@dataclass(frozen=True)
class Origin:
    """`base` is the model's directory (of one on the Hub the headers alone), `name` what the result calls it; `start`
    the directory of the adapter that qinit made for it, None where there is none. `notes` are for the user."""

    base: Path
    name: str
    start: Path | None
    notes: tuple[str, ...]


def origin_of(adapters: Mapping[Path, dict[str, Any]], run: Path | None) -> Origin:
    """Return where adapters, each with its configuration, come from: `run` is what qinit wrote, a run or an adapter for
    a base; with None it is the base that they name.

    Raises ReportError for what is no run, and CheckpointError for adapters of different bases, or of one that is not
    here.
    """
    named = [name for settings in adapters.values() if isinstance(name := settings.get(BASE_KEY), str) and name]
    start = None if run is None else _start_in(run)
    if run is not None and start != run:
        base, own = run, named_base(run / ADAPTER_DIRECTORY)
    else:
        own = _chosen(adapters, named) if start is None else named_base(start)
        base = _found(own or "", start)
        if start is None and (base / REPORT_NAME).is_file() and (base / ADAPTER_DIRECTORY / CONFIG_NAME).is_file():
            start = base / ADAPTER_DIRECTORY
            own = named_base(start)
    source = Report.read(base).source.get("model") if start is not None and start.parent == base else None
    notes = [require_made_for(adapter, settings, base, own, source) for adapter, settings in adapters.items()]
    if start is None:
        notes.append(
            f"{base} holds no start of qinit's: all that the adapters hold is taken for what training added; if they "
            "began with an adapter that qinit made, give its directory"
        )
    return Origin(base, named[0] if named else str(base.resolve()), start, tuple(note for note in notes if note))


def _start_in(run: Path) -> Path:
    """Return the directory of the adapter that a run began with. Raises ReportError."""
    Report.read(run)
    for place in (run / ADAPTER_DIRECTORY, run):
        if (place / CONFIG_NAME).is_file():
            return place
    raise ReportError(f"{run}: has no {ADAPTER_DIRECTORY}, so what training added to it cannot be told from it")


def _chosen(adapters: Mapping[Path, dict[str, Any]], named: list[str]) -> str:
    """Return the first base that adapters name, one that is here before any other. Raises CheckpointError for none."""
    if not named:
        file = next(iter(adapters)) / CONFIG_NAME
        raise CheckpointError(f"{file}: names no base under {BASE_KEY}; give the run that it was trained on")
    return min(named, key=lambda name: not Path(name).is_dir())


def _found(name: str, start: Path | None) -> Path:
    """Return where a base lies, or the headers of one on the Hub. Raises CheckpointError."""
    try:
        return header_directory(name)
    except (CheckpointError, HubError) as error:
        where = "give the run that the adapters were trained on" if start is None else f"{start / CONFIG_NAME} names it"
        raise CheckpointError(f"{error}; {where}") from None
