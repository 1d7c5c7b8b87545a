"""An adapter that was made for a base which exists: against its report, and with the source against both models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from qinit.adapters import ADAPTERS, WEIGHTS_STEM
from qinit.adapters.reading import SavedAdapter
from qinit.errors import QinitError
from qinit.files.tensors import StoredTensor, TensorSpec, read_header
from qinit.linalg.low_rank import LowRank
from qinit.planner.make import make_plan
from qinit.recipe import Recipe, make_recipe
from qinit.report.adapter_card import is_adapter
from qinit.report.report import REPORT_NAME, Report
from qinit.runner.given import base_weights
from qinit.runner.layer import read_weight
from qinit.runner.moved import in_its_coordinates
from qinit.solver.residual import relative_errors, same_error
from qinit.source.checkpoint import count_nonfinite
from qinit.source.targets import LinearModule
from qinit.verification.figures import check_rows, check_totals
from qinit.verification.findings import Checked, Event, Finding, Stage, from_error
from qinit.verification.written import compare

WEIGHTS_FILE = f"{WEIGHTS_STEM}.safetensors"


def repaired_base(directory: Path) -> str | None:
    """Return the base that the adapter in a directory was made for; None for a run that has its own, and for a report
    that cannot be read."""
    try:
        report = Report.read(directory)
        return str(report.totals["base"]["name"]) if is_adapter(report) else None
    except (QinitError, KeyError, TypeError):
        return None


def check_repair(directory: Path, base: str, source: Path | None, *, trust_remote_code: bool) -> Iterator[Event]:
    """Check report and factors, and with the source each layer's errors, one layer at a time; `base` is where the base
    lies. Raises CheckpointError where base or source cannot be read."""
    file = REPORT_NAME
    try:
        report = Report.read(directory)
        recipe = make_recipe(**report.recipe)
        unsound = list(check_rows(report, recipe))
        yield from unsound or check_totals(report, recipe)
        file = WEIGHTS_FILE
        found = read_header(directory / file)
        adapter = SavedAdapter.open(directory, whole=True)
    except QinitError as error:
        yield from_error(directory, file, error)
        return
    if unsound:
        return
    kind = ADAPTERS[recipe.adapter]
    modules = [(LinearModule(row.name, *row.shape, transposed=False), row.rank) for row in report.layers]
    yield Stage("values", sum(tensor.nbytes for tensor in found.values()))
    sound = True
    for event in _check_factors(directory, kind.file_specs(modules), found):
        sound = sound and not isinstance(event, Finding)
        yield event
    if source is None or not sound:
        return
    if not Path(base).is_dir():
        what = f"the base {base} lies on the Hub, so the errors were not measured anew"
        yield Finding(REPORT_NAME, what, grave=False)
        return
    trusted = recipe.model_copy(update={"trust_remote_code": trust_remote_code})  # the report does not decide that
    yield from _check_errors(report, trusted, adapter, Path(base), source)


def _check_factors(directory: Path, specs: list[TensorSpec], found: dict[str, StoredTensor]) -> Iterator[Event]:
    for spec in specs:
        if (problem := compare(directory, directory / WEIGHTS_FILE, spec, found.get(spec.name))) is not None:
            yield problem
    for name, tensor in found.items():
        if bad := sum(count_nonfinite(chunk.view(tensor.dtype)) for chunk in tensor.chunks()):
            yield Finding(WEIGHTS_FILE, f"tensor '{name}' holds {bad} NaN or Inf among {tensor.numel} values")
        yield Checked("tensor", name, tensor.nbytes)


def _check_errors(report: Report, recipe: Recipe, adapter: SavedAdapter, base: Path, source: Path) -> Iterator[Event]:
    """Measure every layer anew, from the base's tensors and the source's."""
    plain = "lora" if report.start else "qlora"
    cpu, asked = torch.device("cpu"), {"calibration": "none", "polish": 0, "method": plain}  # these change no layer
    plan = make_plan(recipe.model_copy(update=asked), source, report.model, base)
    plan = plan if plan.on_source else in_its_coordinates(plan)
    weights = base_weights(plan)
    layers = {layer.target.name: layer for layer in plan.quantized}
    for row in report.layers:
        if row.kept is not None or row.error is None or row.error_start is None:
            continue
        layer = layers.get(row.name)
        value = None if layer is None else weights.read(layer.target.module.parameter, cpu)
        if layer is None or value is None:
            yield Finding(REPORT_NAME, f"{row.name}: is no layer of the base that is repaired")
            continue
        given = value.T.contiguous() if layer.target.module.transposed else value
        weight, nothing = read_weight(layer, cpu), LowRank.none(*given.shape)
        repaired = adapter.apply(row.name, given.clone())
        measured = [relative_errors(weight, each, nothing)[0] for each in (given, repaired)]
        for key, expected, error in zip(("error_start", "error"), (row.error_start, row.error), measured, strict=True):
            if not same_error(error, expected):
                yield Finding(WEIGHTS_FILE, f"{row.name}: {key} against base and source", expected, error)
                break
        yield Checked("layer", row.name, 0)
