"""What a run has finished: its tensors on disk, base and adapter, and the journal that says which of them are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from qinit.adapters import WEIGHTS_STEM
from qinit.clock import counted
from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.files.writer import SafetensorsWriter
from qinit.formats import FORMATS
from qinit.grids import Quantized
from qinit.linalg.low_rank import LowRank
from qinit.machine import CPU
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.report.report import LayerRow
from qinit.workplace.decoded import Decoder
from qinit.workplace.journal import Journal, Record
from qinit.workplace.place import Workplace

SYNC_SECONDS = 1.0  # of work may be lost with the power; a sync takes 20 ms, which many small layers would feel


class Store:
    """Writes tensors and says so in the journal. `rows` are those of finished layers, `copied` the tensors that were
    only copied.

    What an earlier run has finished counts where its checksums are still those in the journal; else it is done again.
    """

    def __init__(self, plan: Plan, place: Workplace, journal: Journal) -> None:
        self.plan, self.place, self.journal, self.decoder = plan, place, journal, Decoder(plan)
        directory = plan.adapter_directory(place.run)
        directory.mkdir(exist_ok=True)
        size, split = plan.max_shard_bytes, plan.split_base
        self.base = SafetensorsWriter(place.run, plan.base_specs, max_bytes=size, split=split)
        self.factors = SafetensorsWriter(directory, plan.adapter_specs, stem=WEIGHTS_STEM, split=plan.split_adapter)
        self.rows: dict[str, LayerRow] = {}
        self.copied: set[str] = set()
        self._synced = time.monotonic()
        self._restore()

    def _restore(self) -> None:
        layers = {layer.target.name: layer for layer in self.plan.layers}
        polish = self.journal.find("polish")
        again = frozenset(polish["sums"]) if polish else frozenset()  # these are written once more anyway
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
                if self._holds(tensors, record, again):
                    self.rows[row.name] = row
                    for writer, name in tensors:
                        writer.keep(name)

    def _tensors(self, layer: LayerPlan) -> list[tuple[SafetensorsWriter, str]]:
        base = [(self.base, spec.name) for spec in layer.specs] if self.plan.given is None else []
        return base + [(self.factors, name) for name in self.plan.adapter.names(layer.target.module, layer.rank)]

    def _holds(self, tensors: list[tuple[SafetensorsWriter, Any]], record: Record, again: Collection[str] = ()) -> bool:
        """Whether the tensors are those of the record, but for such as are written `again`."""
        try:
            return len(record["sums"]) == len(tensors) and all(
                name in again or writer.checksum(name) == wanted
                for (writer, name), wanted in zip(tensors, record["sums"], strict=True)
            )
        except (KeyError, CheckpointError):
            return False

    @counted("writing")
    def left(self) -> Iterator[tuple[StoredTensor, LayerPlan | None]]:
        """Yield the source's tensors that are not finished when they are asked for, each with its layer, None for one
        that is copied; of the tensors of one layer only the first, where it is finished then."""
        layers = {tensor.name: layer for layer in self.plan.layers for tensor in layer.target.tensors}
        for tensor, following in zip_longest(self.plan.pieces, self.plan.pieces[1:]):
            layer = layers.get(tensor.name)
            if layer is None and self.plan.given is not None:
                continue
            if tensor.name not in self.copied and (layer is None or layer.target.name not in self.rows):
                if following is not None:
                    following.announce()
                yield tensor, layer

    def copy(self, name: str, chunks: Iterable[torch.Tensor]) -> None:
        """Write a tensor of the source as it is."""
        sums = [self.base.write_chunks(name, chunks)]
        self.journal.append({"kind": "copied", "name": name, "sums": sums}, sync=False)
        self.copied.add(name)

    @counted("writing")
    def copy_weight(self, layer: LayerPlan, chunks: Iterable[torch.Tensor]) -> None:
        """Write a kept layer's weight as it is, unless the base is there; `put` says that the layer is finished."""
        if self.plan.given is None:
            self.base.write_chunks(layer.target.tensor.name, chunks)

    @counted("writing")
    def copy_whole(self, read: Callable[[StoredTensor], Iterable[torch.Tensor]]) -> None:
        """Write what the adapter holds whole, as `read` gives it from the source: a head, so little that it is written
        again by a run that goes on."""
        for each in self.plan.whole:
            self.factors.write_chunks(each.name, read(each.tensor))

    @counted("writing")
    def put(self, layer: LayerPlan, tensors: dict[str, torch.Tensor], row: LayerRow) -> LayerRow:
        """Write a layer's tensors, base and factors; those that are not given (a kept layer's weight) are there.
        Returns the row."""
        sums = []
        for writer, name in self._tensors(layer):
            sums.append(writer.write(name, tensors[name]) if name in tensors else writer.checksum(name))
        self.rows[row.name] = row
        self.journal.append({"kind": "layer", "row": asdict(row), "sums": sums}, sync=False)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()
        return row

    def replace(self, name: str, tensor: torch.Tensor) -> int:
        """Write a tensor of a finished layer anew, base or factors; returns its checksum."""
        return (self.factors if self.factors.has(name) else self.base).write(name, tensor)

    @counted("writing")
    def sync(self) -> None:
        """Bring to disk what was written, and then that it was."""
        self.base.sync()
        self.factors.sync()
        self.journal.sync()
        self._synced = time.monotonic()

    @counted("writing")
    def close(self) -> None:
        """Finish the files; raises ValueError if a tensor is missing."""
        self.sync()
        self.base.close()
        self.factors.close()

    def quantized(
        self,
        layer: LayerPlan,
        changed: Mapping[str, torch.Tensor] | None = None,
        device: torch.device = CPU,
    ) -> torch.Tensor:
        """Return Q [out, in] of a finished layer in float32 on the device, as a loader has it, or would with other
        tensors in the place of those `changed`."""
        base = {} if self.plan.given is not None else self._base_of(layer)
        return self.decoder.quantized(layer, {**base, **(changed or {})}, device)

    def codes(self, layer: LayerPlan) -> Quantized | None:
        """Return Q of a finished layer as codes; None where the format stores none, and for a base that is there."""
        if self.plan.given is not None:
            return None
        found = self._base_of(layer)
        return FORMATS[self.plan.recipe.format].codes(layer.target, found, layer.bits, layer.group_size)

    def given(self, layer: LayerPlan) -> torch.Tensor | None:
        """Return Q [out, in] of a layer of a base that is there, as `Decoder.given` does."""
        return self.decoder.given(layer)

    def low_rank(self, layer: LayerPlan) -> LowRank:
        """Return L = B A of a finished layer, as PEFT computes it."""
        return self.decoder.low_rank(layer, self._factors_of(layer))

    @counted("writing")
    def tensors(self, layer: LayerPlan) -> dict[str, torch.Tensor]:
        """Return all that was written of a finished layer, base and factors by name.

        It comes from the files whether the layer has been solved just now or before a crash, so that all that is
        measured behind it is the same.
        """
        base = {} if self.plan.given is not None else self._base_of(layer)
        return {**base, **self._factors_of(layer)}

    def weight(self, layer: LayerPlan, device: torch.device) -> torch.Tensor:
        """Return Q + L [out, in] of a finished layer, from its files: what its trainer will have."""
        return self.decoder.weight(layer, self.tensors(layer), device)

    def _base_of(self, layer: LayerPlan) -> dict[str, torch.Tensor]:
        return {spec.name: self.base.read(spec.name) for spec in layer.specs}

    def _factors_of(self, layer: LayerPlan) -> dict[str, torch.Tensor]:
        names = self.plan.adapter.names(layer.target.module) if layer.rank else ()
        return {name: self.factors.read(name) for name in names}


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
