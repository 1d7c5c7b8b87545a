"""The values: finite and as the format has them; with the source, what was copied and every layer's errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.formats import FORMATS
from qinit.solver.residual import residual_norm, same_error
from qinit.source.checkpoint import Checkpoint, count_nonfinite
from qinit.source.targets import Target
from qinit.verification.findings import Checked, Event, Finding, Stage, from_error
from qinit.verification.source import check_source
from qinit.verification.written import Layer, Written, compare, relative


def check_values(written: Written, factors: dict[str, StoredTensor], source: Checkpoint | None) -> Iterator[Event]:
    """Read every tensor once, one layer at a time; `factors` are the adapter's.

    Raises CheckpointError when the source cannot be read.
    """
    everything = (*written.tensors.values(), *factors.values())
    yield Stage("values", sum(tensor.nbytes for tensor in everything))
    originals: dict[str, Target] = {}
    if source is not None:
        originals = yield from check_source(written, source)
    quantized = [layer for layer in written.layers if layer.row.kept is None]
    packed = {spec.name for layer in quantized for spec in layer.specs}
    copied = {} if source is None else written.split(source.tensors)
    for name, tensor in written.pieces.items():
        if name not in packed:
            original = copied.get(name)
            yield from _guarded(written, _check_copied(written, tensor, original))
    paired: set[str] = set()
    for layer in quantized:
        names = written.adapter.names(layer.target.module, layer.row.rank)
        paired |= factors.keys() & set(names)
        pair = [factors[name] for name in names if name in factors]
        yield from _guarded(written, _check_layer(written, layer, pair, originals.get(layer.row.name)))
    for name in [name for name in factors if name not in paired]:
        yield from _guarded(written, _check_finite(written, factors[name], factors[name].chunks()))
    for layer in written.layers:
        names = written.adapter.names(layer.target.module, layer.row.rank)
        if layer.row.kept is not None and names and factors.keys() >= set(names):
            yield from _guarded(written, _check_plain_start(written, layer, [factors[name] for name in names]))


def _guarded(written: Written, events: Iterator[Event]) -> Iterator[Event]:
    """Make a finding of a file of the run that cannot be read to its end; the source's is an error."""
    try:
        yield from events
    except CheckpointError as error:
        file = Path(str(error).partition(": ")[0])
        if not file.is_relative_to(written.directory):
            raise
        yield from_error(written.directory, relative(written.directory, file), error)


def _check_finite(written: Written, tensor: StoredTensor, chunks: Iterable[torch.Tensor]) -> Iterator[Event]:
    bad = sum(count_nonfinite(chunk.view(tensor.dtype)) for chunk in chunks)
    if bad:
        what = f"tensor '{tensor.name}' holds {bad} NaN or Inf among {tensor.numel} values"
        yield Finding(relative(written.directory, tensor.file), what)
    yield Checked("tensor", tensor.name, tensor.nbytes)


def _check_copied(written: Written, tensor: StoredTensor, original: StoredTensor | None) -> Iterator[Event]:
    """A tensor that was copied is finite, and the source's own bit by bit."""
    yield from _check_finite(written, tensor, tensor.chunks())
    if original is None:
        return
    problem = compare(written.directory, tensor.file, original, tensor)
    if problem:
        yield problem
    elif not all(torch.equal(a, b) for a, b in zip(tensor.chunks(), original.chunks(), strict=True)):
        yield Finding(relative(written.directory, tensor.file), f"tensor '{tensor.name}' is not the source's")


def _check_plain_start(written: Written, layer: Layer, parts: list[StoredTensor]) -> Iterator[Event]:
    """The adapter of a layer that was kept changes nothing: nothing is there to repair."""
    if not written.adapter.is_neutral(layer.target.module, {part.name: part.read() for part in parts}):
        last = parts[-1]
        file = relative(written.directory, last.file)
        yield Finding(file, f"tensor '{last.name}', of a layer that was kept", "zeros", "other values")


def _check_layer(written: Written, layer: Layer, pair: list[StoredTensor], original: Target | None) -> Iterator[Event]:
    """A quantized layer's tensors are finite and as its format has them, and as far from the source as reported."""
    stored = {spec.name: written.pieces[spec.name] for spec in layer.specs} | {each.name: each for each in pair}
    tensors = {name: each.read() for name, each in stored.items()}
    sound = len(pair) == len(written.adapter.names(layer.target.module, layer.row.rank))
    for name, tensor in tensors.items():
        for event in _check_finite(written, stored[name], [tensor]):
            sound = sound and not isinstance(event, Finding)
            yield event
    row, fmt = layer.row, FORMATS[written.recipe.format]
    assert row.bits is not None
    assert row.group_size is not None
    for name, expected, found in fmt.flaws(layer.target, tensors, row.group_size):
        sound = False
        yield Finding(relative(written.directory, stored[name].file), f"tensor '{name}'", expected, found)
    if original is None or not sound:
        return
    Q = fmt.decode(layer.target, tensors, row.bits, row.group_size)
    low_rank = written.adapter.decode(layer.target.module, tensors, written.recipe.lora_scale) if row.rank else None
    raw = torch.cat([tensor.read().float() for tensor in original.tensors], dim=original.outputs_side)
    W = raw.T if original.module.transposed else raw
    norm, residual = residual_norm(W, None), Q.neg_().add_(W)
    for key, factors, file in (("error_start", None, layer.specs[0].name), ("error", low_rank, [*stored][-1])):
        expected, measured = getattr(row, key), residual_norm(residual, factors) / norm if norm else 0.0
        if not same_error(measured, expected):
            where = relative(written.directory, stored[file].file)
            yield Finding(where, f"{row.name}: {key} against the source", expected, measured)
            break  # where Q is another one, so is what it is with the adapter
    yield Checked("layer", row.name, 0)
