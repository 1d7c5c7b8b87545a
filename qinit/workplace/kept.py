"""What a run keeps beside its tensors until it is finished: the calibration text, and what a polish has come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qinit.errors import CheckpointError, OutputError
from qinit.files.tensors import TensorSpec, checksum, read_header
from qinit.files.writer import SafetensorsWriter
from qinit.text.samples import Samples
from qinit.workplace.journal import Journal
from qinit.workplace.place import Workplace
from qinit.workplace.store import Store

SAMPLES, POLISH_SAMPLES = "samples", "polish samples"  # the kinds of text, as the journal and the files call them
POLISHED_STEM = "polished"


def save_samples(place: Workplace, journal: Journal, samples: Samples, *, written: bool, kind: str = SAMPLES) -> None:
    """Keep a text, so that it is not drawn again; `written` by the model it is worth keeping alone."""
    tensors = {"tokens": samples.tokens} | ({} if samples.mask is None else {"mask": samples.mask})
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(place.partial, specs, stem=_stem(kind))
    sums = [writer.write(name, tensor) for name, tensor in tensors.items()]
    writer.close()
    journal.append({"kind": kind, "origin": samples.origin, "written": written, "sums": sums})


def load_samples(place: Workplace, journal: Journal, kind: str = SAMPLES) -> Samples | None:
    """Return the text that was kept; None where there is none. Raises OutputError where it is damaged."""
    record = journal.find(kind)
    if record is None:
        return None
    file = place.partial / f"{_stem(kind)}.safetensors"
    try:
        found = read_header(file) if record["sums"] else {}
        whole = [checksum(found[name]) for name in ("tokens", "mask") if name in found] == record["sums"]
        tensors = {name: tensor.read() for name, tensor in found.items()}
        if whole and tensors["tokens"].dim() == 2:
            return Samples(tensors["tokens"], tensors.get("mask"), str(record["origin"]))
    except (KeyError, CheckpointError):
        pass
    raise damaged(file, place)


def save_polish(
    store: Store, result: dict[str, Any], errors: dict[str, tuple[float, float]], tensors: dict[str, torch.Tensor]
) -> None:
    """Keep what a polish has come to, factors and scales, beside the run, whose own it must be able to start from
    again. `errors` are those of Q alone and of Q + L, relative to the weight."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(store.place.partial, specs, stem=POLISHED_STEM)
    sums = {name: writer.write(name, tensor) for name, tensor in tensors.items()}
    writer.close()
    store.journal.append({"kind": "polish", "result": result, "errors": errors, "sums": sums})


def apply_polish(store: Store) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """Put the kept factors and scales in their places; returns what the polish has come to and the layers' errors.

    Raises OutputError where they are damaged.
    """
    record = store.journal.find("polish")
    assert record is not None
    file = store.place.partial / f"{POLISHED_STEM}.safetensors"
    try:
        found = read_header(file) if record["sums"] else {}
        for name, wanted in record["sums"].items():
            if store.replace(name, found[name].read()) != wanted:
                raise damaged(file, store.place)
    except (KeyError, CheckpointError):
        raise damaged(file, store.place) from None
    return record["result"], record["errors"]


def _stem(kind: str) -> str:
    return kind.replace(" ", "-")


def damaged(file: Path, place: Workplace) -> OutputError:
    return OutputError(
        f"{file}: damaged, so that the unfinished run cannot go on; remove {place.partial} to start anew"
    )
