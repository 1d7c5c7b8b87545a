"""What a run has finished: its tensors on disk, base and adapter, and the journal that says which of them are there."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from qinit.adapters import lora as adapter
from qinit.errors import CheckpointError, OutputError
from qinit.files.tensors import TensorSpec, checksum, read_header
from qinit.files.writer import SafetensorsWriter
from qinit.formats import FORMATS
from qinit.journal import Journal, Record
from qinit.linalg.low_rank import LowRank
from qinit.output import Workplace
from qinit.plan.plan import LayerPlan, Plan
from qinit.report.report import LayerRow
from qinit.text.samples import Samples

SAMPLES_STEM, POLISHED_STEM = "samples", "polished"
SYNC_SECONDS = 1.0  # of work may be lost with the power; a sync takes 20 ms, which many small layers would feel


class Store:
    """Writes tensors and says so in the journal. `rows` are those of finished layers, `copied` the tensors that were
    only copied.

    What an earlier run has finished counts where its checksums are still those in the journal; else it is done again.
    """

    def __init__(self, plan: Plan, place: Workplace, journal: Journal) -> None:
        self.plan, self.place, self.journal = plan, place, journal
        directory = place.run / adapter.ADAPTER_DIRECTORY
        directory.mkdir(exist_ok=True)
        self.base = SafetensorsWriter(place.run, plan.base_specs, max_bytes=plan.max_shard_bytes)
        self.factors = SafetensorsWriter(directory, plan.adapter_specs, stem=adapter.WEIGHTS_STEM)
        self.rows: dict[str, LayerRow] = {}
        self.copied: set[str] = set()
        self._synced = time.monotonic()
        self._restore()

    def _restore(self) -> None:
        layers = {layer.target.name: layer for layer in self.plan.layers}
        polish = self.journal.find("polish")
        polished = polish is not None and bool(polish["sums"])  # then the factors are written once more anyway
        for record in self.journal.records:
            if record["kind"] == "copied" and self._holds([(self.base, record["name"])], record):
                self.copied.add(record["name"])
                self.base.keep(record["name"])
            if record["kind"] == "layer":
                row = _row(record["row"])
                layer = layers.get(row.name) if row else None
                if row is None or layer is None or not _fits(row, layer):
                    continue
                tensors = self._tensors(layer)
                if self._holds(tensors[: len(layer.specs)] if polished else tensors, record):
                    self.rows[row.name] = row
                    for writer, name in tensors:
                        writer.keep(name)

    def _tensors(self, layer: LayerPlan) -> list[tuple[SafetensorsWriter, str]]:
        base = [(self.base, spec.name) for spec in layer.specs]
        return base + [(self.factors, name) for name in adapter.tensor_names(layer.target.module)]

    def _holds(self, tensors: list[tuple[SafetensorsWriter, Any]], record: Record) -> bool:
        try:
            return len(record["sums"]) >= len(tensors) and all(
                writer.checksum(name) == wanted for (writer, name), wanted in zip(tensors, record["sums"], strict=False)
            )
        except (KeyError, CheckpointError):
            return False

    def copy(self, name: str, chunks: Iterable[torch.Tensor]) -> None:
        """Write a tensor of the source as it is."""
        sums = [self.base.write_chunks(name, chunks)]
        self.journal.append({"kind": "copied", "name": name, "sums": sums}, sync=False)
        self.copied.add(name)

    def put(self, layer: LayerPlan, tensors: dict[str, torch.Tensor], row: LayerRow) -> None:
        """Write a layer's tensors, base and factors; those that are not given (a kept layer's weight) are there."""
        sums = []
        for writer, name in self._tensors(layer):
            sums.append(writer.write(name, tensors[name]) if name in tensors else writer.checksum(name))
        self.rows[row.name] = row
        self.journal.append({"kind": "layer", "row": asdict(row), "sums": sums}, sync=False)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring to disk what was written, and then that it was."""
        self.base.sync()
        self.factors.sync()
        self.journal.sync()
        self._synced = time.monotonic()

    def close(self) -> None:
        """Finish the files; raises ValueError if a tensor is missing."""
        self.sync()
        self.base.close()
        self.factors.close()

    def quantized(self, layer: LayerPlan) -> torch.Tensor:
        """Return Q [out, in] of a finished layer in float32, as a loader has it."""
        tensors = {spec.name: self.base.read(spec.name) for spec in layer.specs}
        return FORMATS[self.plan.recipe.format].decode(layer.target, tensors, layer.bits, layer.group_size)

    def low_rank(self, layer: LayerPlan) -> LowRank:
        """Return L = B A of a finished layer, as PEFT computes it."""
        module = layer.target.module
        tensors = {name: self.factors.read(name) for name in adapter.tensor_names(module)}
        return adapter.decode(module, tensors, self.plan.recipe.lora_scale)

    def weight(self, layer: LayerPlan, device: torch.device) -> torch.Tensor:
        """Return Q + L [out, in] of a finished layer: what its trainer will have.

        It comes from the files whether the layer has been solved just now or before a crash, so that all that is
        measured behind it is the same.
        """
        low_rank = self.low_rank(layer)
        return self.quantized(layer).to(device).addmm_(low_rank.B.to(device), low_rank.A.to(device))


def save_samples(place: Workplace, journal: Journal, samples: Samples, *, written: bool) -> None:
    """Keep the calibration text, so that it is not drawn again; `written` by the model it is worth keeping alone."""
    tensors = {"tokens": samples.tokens} | ({} if samples.mask is None else {"mask": samples.mask})
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(place.partial, specs, stem=SAMPLES_STEM)
    sums = [writer.write(name, tensor) for name, tensor in tensors.items()]
    writer.close()
    journal.append({"kind": "samples", "origin": samples.origin, "written": written, "sums": sums})


def load_samples(place: Workplace, journal: Journal) -> Samples | None:
    """Return the text that was kept; None where there is none. Raises OutputError where it is damaged."""
    record = journal.find("samples")
    if record is None:
        return None
    file = place.partial / f"{SAMPLES_STEM}.safetensors"
    try:
        found = read_header(file)
        whole = [checksum(found[name]) for name in ("tokens", "mask") if name in found] == record["sums"]
        tensors = {name: tensor.read() for name, tensor in found.items()}
        if whole and tensors["tokens"].dim() == 2:
            return Samples(tensors["tokens"], tensors.get("mask"), str(record["origin"]))
    except (KeyError, CheckpointError):
        pass
    raise damaged(file, place)


def save_polish(
    store: Store, result: dict[str, Any], errors: dict[str, float], factors: dict[str, torch.Tensor]
) -> None:
    """Keep what a polish has come to beside the adapter, whose own factors it must be able to start from again."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in factors.items()]
    writer = SafetensorsWriter(store.place.partial, specs, stem=POLISHED_STEM)
    sums = {name: writer.write(name, tensor) for name, tensor in factors.items()}
    writer.close()
    store.journal.append({"kind": "polish", "result": result, "errors": errors, "sums": sums})


def apply_polish(store: Store) -> tuple[dict[str, Any], dict[str, float]]:
    """Put the kept factors in the adapter; returns what the polish has come to and the layers' weight errors.

    Raises OutputError where they are damaged.
    """
    record = store.journal.find("polish")
    assert record is not None
    file = store.place.partial / f"{POLISHED_STEM}.safetensors"
    try:
        found = read_header(file)
        for name, wanted in record["sums"].items():
            if store.factors.write(name, found[name].read()) != wanted:
                raise damaged(file, store.place)
    except (KeyError, CheckpointError):
        raise damaged(file, store.place) from None
    return record["result"], record["errors"]


def damaged(file: Path, place: Workplace) -> OutputError:
    return OutputError(
        f"{file}: damaged, so that the unfinished run cannot go on; remove {place.partial} to start anew"
    )


def _row(value: Any) -> LayerRow | None:
    try:
        return TypeAdapter(LayerRow).validate_python(value)
    except ValidationError:
        return None


def _fits(row: LayerRow, layer: LayerPlan) -> bool:
    module = layer.target.module
    width = (None, None) if layer.kept else (layer.bits, layer.group_size)
    return (row.shape, row.rank, row.kept, row.bits, row.group_size) == (
        (module.out_features, module.in_features),
        layer.rank,
        layer.kept,
        *width,
    )
