"""Whether an adapter was made for the base of a run: what PEFT makes of it, and which base it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME
from qinit.adapters.trained import read_trained
from qinit.errors import CheckpointError, ReportError
from qinit.files.tensors import StoredTensor
from qinit.report.report import Report
from qinit.source.checkpoint import read_json
from qinit.stock.adapting import Refused, adapt
from qinit.stock.skeleton import Skeleton
from qinit.trial.names import shown

BASE_KEY = "base_model_name_or_path"


def require_names(
    adapter: Path, settings: dict[str, Any], tensors: Mapping[str, StoredTensor], skeleton: Skeleton
) -> None:
    """Let PEFT load an adapter on the model without weights. Raises CheckpointError where it refuses it, drops one of
    its tensors, has nothing in the file for what it trains, or wants another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        found = adapt(skeleton, settings, shapes)
    except Refused as error:
        raise CheckpointError(f"{adapter}: PEFT does not load it on this base ({error}); {_ADVICE}") from None
    other = sorted(name for name in shapes if name in found.tensors and found.tensors[name] != shapes[name])
    if other:
        have, want = (list(each[other[0]]) for each in (shapes, found.tensors))
        raise CheckpointError(
            f"{adapter}: '{other[0]}' is {have}, and on this base PEFT wants {want} ({len(other)} such tensors); "
            f"{_ADVICE}"
        )
    if found.lost:
        raise CheckpointError(f"{adapter}: PEFT finds no place on this base for {shown(found.lost)}; {_ADVICE}")
    if missing := found.tensors.keys() - shapes.keys():
        raise CheckpointError(
            f"{adapter}: holds nothing for {shown(missing)}, which its {CONFIG_NAME} asks for; was it saved whole?"
        )


def require_made_for(adapter: Path, settings: dict[str, Any], run: Path, report: Report) -> str | None:
    """Compare the base that an adapter names with a run's; returns what is to be known where neither the directory nor
    the name can be compared. Raises CheckpointError for another one.

    The run itself, wherever it lies now: the directory that is named is it, or holds the same layers with the same
    errors; or the name is the one that the run's own adapter has, as it was when the run was made or pushed. What lies
    in the run's directory belongs to it.
    """
    if run.resolve() in adapter.resolve().parents:
        return None
    named = settings.get(BASE_KEY)
    if not isinstance(named, str) or not named:
        return f"the adapter names no base, so that it was compared by names and shapes alone: {adapter}"
    start = run / ADAPTER_DIRECTORY / CONFIG_NAME
    own = read_json(start, "").get(BASE_KEY) if start.is_file() else None  # pushed with a trained one, it has none
    if named == own or Path(named).resolve() == run.resolve():
        return None
    if Path(named).is_dir():
        if _is_same(Path(named), report):
            return None
        raise _other(adapter, named, run, "which is another model")
    if named == report.source.get("model"):
        raise _other(adapter, named, run, "the 16-bit model that the run was made from, and not the run's base")
    if not PurePath(named).is_absolute() and _ends_with(str(own), named):
        return None  # as it was given, from the directory where the trainer ran
    return (
        f"the adapter names the base '{named}', which is not here and is not what the run's own adapter names; names "
        "and shapes fit, and nothing else could be compared"
    )


def open_adapter(adapter: Path) -> dict[str, Any]:
    """Return the configuration of a saved adapter. Raises CheckpointError for what is none."""
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter}: no such directory; --adapter takes what PEFT has saved")
    return read_trained(adapter)


def _is_same(directory: Path, report: Report) -> bool:
    try:
        return Report.read(directory).layers == report.layers
    except ReportError:
        return False


def _ends_with(path: str, end: str) -> bool:
    parts = PurePath(end).parts
    return bool(parts) and PurePath(path).parts[-len(parts) :] == parts


def _other(adapter: Path, named: str, run: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter / CONFIG_NAME}: {BASE_KEY} is '{named}', {what}; merge it onto the base that it was trained on, or "
        f"if that is {run}, say so there"
    )


_ADVICE = "give the run that it was trained on"
