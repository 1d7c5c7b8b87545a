"""A merge as data, made from headers alone: what is read, what becomes of it, and where it goes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qinit.adapters import ADAPTER_DIRECTORY, WEIGHTS_STEM
from qinit.adapters.reading import kind_of
from qinit.adapters.trained import WEIGHTS_NAME
from qinit.errors import RecipeError, did_you_mean
from qinit.exports.finished import open_base
from qinit.files.manifest import MANIFEST_NAME, file_sum, read_manifest
from qinit.files.tensors import read_header
from qinit.merge.steps import Laying, Layout
from qinit.merge.ties import ties, untied
from qinit.report.card import TRAINED_DIRECTORY
from qinit.report.pictures.files import PICTURES
from qinit.report.report import Report
from qinit.stock.skeleton import Skeleton
from qinit.stream.weights import ModelWeights
from qinit.trial.fitting import named_base, open_adapter, require_made_for, require_names
from qinit.words import parse_size
from qinit.workplace.place import require_finished

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_SIZE = "5GB"  # as a run writes it


@dataclass(frozen=True)
class MergePlan:
    """What a merge will read and write. `config` is the output's config.json; `notes` are for the user."""

    run: Path
    report: Report
    weights: ModelWeights
    adapter: Path
    settings: dict[str, Any]
    layout: Layout
    config: dict[str, Any]
    dtype: str | None
    max_shard_bytes: int
    notes: tuple[str, ...]

    @property
    def own(self) -> bool:
        """Whether the adapter is the one that lies in the run."""
        return self.adapter.resolve() == (self.run / ADAPTER_DIRECTORY).resolve()

    @property
    def weight_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.layout.specs)

    @property
    def nbytes(self) -> int:
        """What the output takes on the disk, but for the card and the like."""
        return self.weight_bytes + sum((self.run / name).stat().st_size for name in self.companions)

    @property
    def companions(self) -> list[Path]:
        """The files to carry along, relative: of the run's own, where it has a list of these."""
        listed = read_manifest(self.run) if (self.run / MANIFEST_NAME).is_file() else None
        found = [name for name in self.weights.checkpoint.companions() if name.as_posix() not in PICTURES]
        return found if listed is None else [name for name in found if name.as_posix() in listed]

    def identity(self) -> dict[str, str]:
        """Return the sums that tell the run's base and the adapter from any others."""
        sums = self.run / MANIFEST_NAME
        base = file_sum(sums) if sums.is_file() else hashlib.sha256(self.report.to_json().encode()).hexdigest()
        return {"run": base, "adapter": file_sum(self.adapter / WEIGHTS_NAME)}


def plan_merge(
    run: Path,
    adapter: Path | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    trust_remote_code: bool = False,
) -> MergePlan:
    """Plan the merge of a finished run with its own adapter, or with one that was trained on its base. No weight is
    read.

    Raises ReportError for what is no finished run, CheckpointError for what is damaged, for an adapter that was made
    for another base and for one that cannot be merged, and RecipeError for an unknown dtype or size.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"--dtype: no '{dtype}'{did_you_mean(dtype, DTYPES)}; known are {', '.join(DTYPES)}")
    try:
        shard_bytes = parse_size(max_shard_size or SHARD_SIZE)
    except ValueError as error:
        raise RecipeError(f"--max-shard-size: {error}, found '{max_shard_size}'") from None
    require_finished(run)
    report = Report.read(run)
    weights, architecture = open_base(run, trust_remote_code=trust_remote_code)
    place = adapter or _own_adapter(run)
    settings = open_adapter(place)
    tensors = read_header(place / f"{WEIGHTS_STEM}.safetensors")
    kind = kind_of(place, settings)
    changes = kind.changes(place, settings, tensors, architecture)
    require_names(place, settings, tensors, Skeleton.of(weights.checkpoint, trust_remote_code))
    own = named_base(run / ADAPTER_DIRECTORY)  # pushed with a trained one, it has none
    note = require_made_for(place, settings, run, own, report.source.get("model"))
    layout = Laying(weights, architecture, report, changes, DTYPES.get(dtype or "")).laid_out(ties(weights))
    return MergePlan(
        run,
        report,
        weights,
        place,
        settings,
        layout,
        _config(weights.checkpoint.config, layout, dtype),
        dtype,
        shard_bytes,
        (note,) if note else (),
    )


def _own_adapter(run: Path) -> Path:
    """Return the adapter that lies in a run: its own, or the one that it was pushed with."""
    own, trained = run / ADAPTER_DIRECTORY, run / TRAINED_DIRECTORY
    return trained if trained.is_dir() and not own.is_dir() else own


def _config(config: dict[str, Any], layout: Layout, dtype: str | None) -> dict[str, Any]:
    """Return config.json of the output: no quantization, the type that was asked for, ties as they are now."""
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    if dtype is not None:
        found["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return untied(found) if layout.untied else found
