"""A run's base as its headers and its configuration describe it, against its report."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qinit.adapters import ADAPTERS, Adapter
from qinit.errors import CheckpointError, QinitError
from qinit.files.tensors import INDEX_NAME, StoredTensor, TensorSpec, read_header
from qinit.formats import FORMATS
from qinit.recipe import Recipe, make_recipe
from qinit.report.report import REPORT_NAME, LayerRow, Report
from qinit.source.checkpoint import SINGLE_NAME, Checkpoint, indexed_files, read_json
from qinit.source.names import Names
from qinit.source.targets import Architecture, LinearModule, Target, expert_targets, read_architecture
from qinit.verification.figures import check_rows, check_totals
from qinit.verification.findings import Finding, from_error

CONFIG = "config.json"


@dataclass(frozen=True)
class Layer:
    """A row of the report and the tensors of the base that hold its layer."""

    row: LayerRow
    target: Target
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Written:
    """A run that can be read: `tensors` are the base's, `layers` those whose tensors are as they should be."""

    directory: Path
    report: Report
    recipe: Recipe
    config: dict[str, Any]
    architecture: Architecture
    modules: dict[str, LinearModule]
    tensors: dict[str, StoredTensor]
    layers: tuple[Layer, ...]

    @cached_property
    def pieces(self) -> dict[str, StoredTensor]:
        """The base's tensors by the names that layers have for them: those that hold several experts slice by slice."""
        return self.split(self.tensors)

    def split(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Return tensors of such a model by these names."""
        names = {part for stack in self.architecture.stacks for parts in stack.sources for part in parts}
        sliced = {name.rpartition("[")[0] for name in names - self.tensors.keys()}
        parts = (part for name, t in tensors.items() for part in (t.slices() if name in sliced else [t]))
        return {part.name: part for part in parts}

    @property
    def adapter(self) -> Adapter:
        """The kind of adapter that the run has."""
        return ADAPTERS[self.recipe.adapter]


def open_written(directory: Path, *, trust_remote_code: bool = False) -> Generator[Finding, None, Written | None]:
    """Read report, configuration and headers, and compare them; None where too little can be read to go on."""
    file = REPORT_NAME
    try:
        report = Report.read(directory)
        recipe = make_recipe(**report.recipe)
        unsound = list(check_rows(report, recipe))
        yield from unsound or check_totals(report, recipe)
        file = CONFIG
        config = read_json(directory / CONFIG, "the directory is incomplete; run qinit again")
        tensors, whole = yield from read_headers(directory)
        checkpoint = Checkpoint(directory, config, tensors)
        architecture = read_architecture(checkpoint, trust_remote_code)
    except QinitError as error:
        yield from_error(directory, file, error)
        return None
    modules = architecture.modules
    unknown = [row for row in report.layers if _shape_of(modules.get(row.name)) != tuple(row.shape)]
    for row in unknown:
        yield Finding(CONFIG, f"{row.name}: shape", list(row.shape), _shape_of(modules.get(row.name)))
    if (found := architecture.class_name) != report.source.get("class"):
        yield Finding(CONFIG, "the model's class", report.source.get("class"), found)
    if unsound or unknown:
        return None
    yield from _check_quantization(report, recipe, config, architecture)
    layers: list[Layer] = []
    if whole:
        names = architecture.names_in(checkpoint)
        fields = (directory, report, recipe, config, architecture, modules, tensors)
        so_far = Written(*fields, ())
        experts = {
            target.name: target for target in expert_targets(Checkpoint(directory, config, tensors), architecture)
        }
        for row in report.layers:
            expert = experts.get(row.name)
            checked = _check_layer(so_far, names, row) if expert is None else _check_expert(so_far, row, expert)
            layer = yield from checked
            layers += [layer] if layer else []
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if nbytes != report.totals.get("base_bytes"):
            file = INDEX_NAME if (directory / INDEX_NAME).is_file() else SINGLE_NAME
            yield Finding(file, "bytes of all tensors", report.totals.get("base_bytes"), nbytes)
    return Written(directory, report, recipe, config, architecture, modules, tensors, tuple(layers))


def _shape_of(module: LinearModule | None) -> tuple[int, int] | None:
    return (module.out_features, module.in_features) if module else None


def _check_quantization(
    report: Report, recipe: Recipe, config: dict[str, Any], architecture: Architecture
) -> Iterator[Finding]:
    grids = {row.name: (row.bits, row.group_size or 0) for row in report.layers if row.bits is not None}
    kept = [module.name for module in architecture.linear if module.name not in grids]
    expected = FORMATS[recipe.format].quantization_config(grids, kept, architecture.classes)
    found = config.get("quantization_config")
    if not isinstance(expected, dict) or not isinstance(found, dict):
        if expected != found:
            yield Finding(CONFIG, "quantization_config", expected, found)
        return
    yield from differing(CONFIG, "quantization_config.", expected, found)


def differing(file: str, prefix: str, expected: dict[str, Any], found: dict[str, Any]) -> Iterator[Finding]:
    """Name each key whose value is another one."""
    for key in {**expected, **found}:
        if expected.get(key) != found.get(key):
            yield Finding(file, f"{prefix}{key}", expected.get(key), found.get(key))


def read_headers(directory: Path) -> Generator[Finding, None, tuple[dict[str, StoredTensor], bool]]:
    """Read the headers of all weight files against the index; returns the tensors, and whether all could be read."""
    single, index = (directory / SINGLE_NAME).is_file(), (directory / INDEX_NAME).is_file()
    if single and index:
        yield Finding(INDEX_NAME, f"stands beside {SINGLE_NAME}, which loaders take instead")
    try:
        files: dict[str, list[str]] = {SINGLE_NAME: []} if single else indexed_files(directory)
    except CheckpointError as error:
        yield from_error(directory, INDEX_NAME if index else SINGLE_NAME, error)
        return {}, False
    tensors: dict[str, StoredTensor] = {}
    whole = True
    for file, names in files.items():
        try:
            found = read_header(directory / file)
        except CheckpointError as error:
            yield from_error(directory, file, error)
            whole = False
            continue
        for name in sorted(set(names) ^ found.keys()) if not single else ():
            what = "is not there, but the index places it here" if name in names else "is not in the index"
            yield Finding(file, f"tensor '{name}' {what}")
        for name in sorted(found.keys() & tensors.keys()):
            yield Finding(file, f"tensor '{name}' is in {tensors[name].file.name} too")
        tensors.update(found)
    if not single and whole:
        metadata = read_json(directory / INDEX_NAME, "").get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if total != nbytes:
            yield Finding(INDEX_NAME, "metadata.total_size", nbytes, total)
    return tensors, whole


def _check_expert(written: Written, row: LayerRow, target: Target) -> Generator[Finding, None, Layer | None]:
    """The same for an expert, whose tensors the architecture was matched with."""
    specs = tuple(FORMATS[written.recipe.format].specs(target, row.bits or 0, row.group_size or 0))
    if row.kept is not None or any(spec.name not in written.pieces for spec in specs):
        yield Finding(REPORT_NAME, f"{row.name}: is not stored as format {written.recipe.format} stores experts")
        return None
    if (nbytes := sum(spec.nbytes for spec in specs)) != row.bytes_after:
        yield Finding(REPORT_NAME, f"{row.name}: bytes_after", nbytes, row.bytes_after)
    return Layer(row, target, specs)


def _check_layer(written: Written, names: Names, row: LayerRow) -> Generator[Finding, None, Layer | None]:
    """Compare the tensors of one layer with what its format stores; returns the layer if all are as they should be."""
    tensors, module = written.tensors, written.modules[row.name]
    fmt, shape = FORMATS[written.recipe.format], (module.out_features, module.in_features)
    name = names.prefix(row.name, fmt.parts) + "weight"
    there = tensors.get(name)
    dtype = there.dtype if there and there.dtype.is_floating_point else torch.float32
    place = StoredTensor(name, dtype, shape[::-1] if module.transposed else shape, written.directory, 0)
    target = Target(module, place)
    own = TensorSpec(name, dtype, place.shape)
    specs = (own,) if row.kept is not None else tuple(fmt.specs(target, row.bits or 0, row.group_size or 0))
    layer = Layer(row, target, specs)
    sound = True
    for spec in layer.specs:
        found = tensors.get(spec.name)
        where = written.directory / (SINGLE_NAME if (written.directory / SINGLE_NAME).is_file() else INDEX_NAME)
        problem = compare(written.directory, found.file if found else where, spec, found)
        if problem:
            sound = False
            yield problem
    nbytes = sum(spec.nbytes for spec in layer.specs)
    if sound and nbytes != row.bytes_after:
        yield Finding(REPORT_NAME, f"{row.name}: bytes_after", nbytes, row.bytes_after)
    expected = {spec.name for spec in layer.specs} | {layer.target.prefix + "bias"}
    for name in sorted(name for name in tensors if name.startswith(layer.target.prefix) and name not in expected):
        yield Finding(relative(written.directory, tensors[name].file), f"tensor '{name}' is none of {row.name}'s")
    return replace(layer, target=_placed(layer, tensors)) if sound else None


def compare(directory: Path, file: Path, spec: TensorSpec, found: TensorSpec | None) -> Finding | None:
    """Return what is wrong with a tensor's header, or None."""
    name = relative(directory, file)
    if found is None:
        return Finding(name, f"tensor '{spec.name}' is missing")
    expected, there = (f"{each.dtype} {list(each.shape)}".removeprefix("torch.") for each in (spec, found))
    return None if expected == there else Finding(name, f"tensor '{spec.name}'", expected, there)


def relative(directory: Path, file: Path) -> str:
    """Return a file's name below a directory, with forward slashes."""
    return file.relative_to(directory).as_posix()


def _placed(layer: Layer, tensors: dict[str, StoredTensor]) -> Target:
    place = layer.target.tensor
    return replace(layer.target, tensor=tensors.get(place.name, place))
