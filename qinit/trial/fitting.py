"""Whether an adapter was made for the base of a run: what PEFT makes of it, and which base it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from qinit.adapters import CONFIG_NAME
from qinit.adapters.trained import read_trained
from qinit.errors import CheckpointError
from qinit.files.manifest import MANIFEST_NAME, bytes_sum, file_sum, read_manifest
from qinit.files.tensors import StoredTensor
from qinit.source.checkpoint import read_json, weight_files
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


def require_made_for(
    adapter: Path, settings: dict[str, Any], base: Path, own: str | None = None, source: str | None = None
) -> str | None:
    """Compare the base that an adapter names with `base`; returns what is to be known where neither the directory nor
    the name can be compared. Raises CheckpointError for another one.

    The base itself, wherever it lies now: the directory that is named is it, or holds the same weights by their sums;
    or the name is `own`, the one that the start has, as it was when the run was made or pushed. What lies in the base's
    directory belongs to it. `source` is the 16-bit model that the base was made from.
    """
    if base.resolve() in adapter.resolve().parents:
        return None
    named = settings.get(BASE_KEY)
    if not isinstance(named, str) or not named:
        return f"the adapter names no base, so that it was compared by names and shapes alone: {adapter}"
    if named == own or Path(named).resolve() == base.resolve():
        return None
    if Path(named).is_dir():
        theirs, ours = base_sum(Path(named)), base_sum(base)
        if theirs == ours:
            return None
        raise _other(
            adapter,
            named,
            base,
            f"which is another model (its weights have the sum {theirs[:12]}..., not {ours[:12]}...)",
        )
    if named == source:
        raise _other(adapter, named, base, "the 16-bit model that the run was made from, and not the run's base")
    if not PurePath(named).is_absolute() and _ends_with(str(own), named):
        return None  # as it was given, from the directory where the trainer ran
    return (
        f"the adapter names the base '{named}', which is not here and is not what the run's own adapter names; names "
        "and shapes fit, and nothing else could be compared"
    )


def named_base(adapter: Path) -> str | None:
    """Return the base that an adapter's directory names, None where it names none or holds no adapter."""
    file = adapter / CONFIG_NAME
    named = read_json(file, "").get(BASE_KEY) if file.is_file() else None
    return named if isinstance(named, str) and named else None


def base_sum(directory: Path) -> str:
    """Return a SHA-256 over the sums of a model's weight files and their names; those of SHA256SUMS where they are
    there. Raises CheckpointError for a directory that holds no weights, ReportError for a damaged list."""
    listed = read_manifest(directory) if (directory / MANIFEST_NAME).is_file() else {}
    names = [file.relative_to(directory).as_posix() for file, _ in weight_files(directory)]
    sums = {name: listed.get(name) or file_sum(directory / name) for name in names}
    return bytes_sum(json.dumps(sums, sort_keys=True).encode())


def open_adapter(adapter: Path, option: str = "--adapter") -> dict[str, Any]:
    """Return the configuration of a saved adapter that an option gives. Raises CheckpointError for what is none."""
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter}: no such directory; {option} takes what PEFT has saved")
    return read_trained(adapter)


def _ends_with(path: str, end: str) -> bool:
    parts = PurePath(end).parts
    return bool(parts) and PurePath(path).parts[-len(parts) :] == parts


def _other(adapter: Path, named: str, base: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter / CONFIG_NAME}: {BASE_KEY} is '{named}', {what}; give the run that it was trained on, or if "
        f"that is {base}, say so there"
    )


_ADVICE = "give the run that it was trained on"
