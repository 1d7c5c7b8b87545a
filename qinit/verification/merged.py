"""A merge reread: hashes, tensors, finite values, and with the run it was made from every value W' anew."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from qinit.errors import CheckpointError, QinitError
from qinit.files.tensors import StoredTensor
from qinit.merge.plan import MergePlan, plan_merge
from qinit.merge.run import merged_value
from qinit.report.merged import MergeReport
from qinit.report.report import REPORT_NAME
from qinit.source.checkpoint import count_nonfinite, read_json
from qinit.trial.names import on_meta, shown
from qinit.verification.files import check_files
from qinit.verification.findings import Checked, Event, Finding, Stage, from_error
from qinit.verification.written import CONFIG, compare, differing, read_headers, relative

FLIPPED = 0.01  # of the values may be rounded the other way where another processor adds in another order


def verify_merged(
    directory: Path, run: Path | None = None, adapter: Path | None = None, *, trust_remote_code: bool = False
) -> Iterator[Event]:
    """Check the directory of a merge; with `run`, which it was made from, and the `adapter` where that was another than
    the run's own, every value too. One tensor is in memory at a time.

    Raises ReportError for a directory that is no merge, CheckpointError where run and adapter cannot be read.
    """
    report = MergeReport.read(directory)
    trusted = {"trust_remote_code": trust_remote_code}
    plan = None
    if run is not None:
        anew = report.requantized is None
        plan = plan_merge(run, adapter, dtype=report.dtype, **trusted) if anew else None  # type: ignore[arg-type]
    yield from check_files(directory)
    tensors, whole = yield from read_headers(directory)
    if not whole:
        return
    yield from _check_report(report, tensors, plan)
    yield from _check_names(directory, report, **trusted)
    yield Stage("values", sum(tensor.nbytes for tensor in tensors.values()))
    if plan is not None:
        yield from _check_values(directory, plan, tensors)
    else:
        for tensor in tensors.values():
            yield from _check_finite(directory, tensor)


def _check_report(
    report: MergeReport, tensors: dict[str, StoredTensor], plan: MergePlan | None
) -> Generator[Finding, None, None]:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    for key, found in (("tensors", len(tensors)), ("bytes", nbytes)):
        if report.totals.get(key) != found:
            yield Finding(REPORT_NAME, f"totals: {key}", found, report.totals.get(key))
    if plan is not None:
        for key, expected in plan.identity().items():
            if (named := getattr(report, key).get("sha256")) != expected:
                yield Finding(REPORT_NAME, f"{key}: sha256, which is of another {key}", expected, named)


def _check_names(directory: Path, report: MergeReport, *, trust_remote_code: bool) -> Iterator[Finding]:
    """Let transformers look for every name; of what is packed the parts are taken for what they are."""
    if report.requantized is not None:
        return
    try:
        _, info = on_meta(directory, report.loader, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        yield from_error(directory, CONFIG, error)
        return
    for names, what, grave in (
        (info.missing, "finds nothing for", True),
        (info.mismatched, "wants another shape of", True),
        (info.unexpected, "passes over", False),
    ):
        if names:
            yield Finding(CONFIG, f"{report.loader} {what} {shown(names)}", grave=grave)


def _check_finite(directory: Path, tensor: StoredTensor) -> Iterator[Event]:
    try:
        bad = sum(count_nonfinite(chunk.view(tensor.dtype)) for chunk in tensor.chunks())
    except CheckpointError as error:
        yield from_error(directory, relative(directory, tensor.file), error)
        return
    if bad:
        what = f"tensor '{tensor.name}' holds {bad} NaN or Inf among {tensor.numel} values"
        yield Finding(relative(directory, tensor.file), what)
    yield Checked("tensor", tensor.name, tensor.nbytes)


def _check_values(directory: Path, plan: MergePlan, tensors: dict[str, StoredTensor]) -> Iterator[Event]:
    """Compare every tensor with what the run and the adapter give."""
    config = read_json(directory / CONFIG, "the directory is incomplete; run `qinit merge` again")
    yield from differing(CONFIG, "differs from the run's: ", plan.config, config)
    specs = {spec.name: spec for spec in plan.layout.specs}
    file = next(iter(tensors.values())).file
    sound = True
    for name in sorted(specs.keys() | tensors.keys()):
        if name not in specs:
            sound = False
            yield Finding(relative(directory, tensors[name].file), f"tensor '{name}' is none of the run's")
        elif problem := compare(
            directory, tensors[name].file if name in tensors else file, specs[name], tensors.get(name)
        ):
            sound = False
            yield problem
    if not sound:
        return
    pieces = plan.layout.split(tensors)
    for step in plan.layout.steps:
        parts = [pieces[place.name] for place in step.places]
        if step.is_plain and [part.dtype for part in parts] == [tensor.dtype for tensor in step.tensors]:
            for part, tensor in zip(parts, step.tensors, strict=True):
                yield from _check_copied(directory, part, tensor)
            continue
        for part in parts:
            yield from _check_finite(directory, part)
        expected = step.split(merged_value(plan, step))
        for part, value in zip(parts, expected, strict=True):
            try:
                far = _distance(part.read(), value)
            except QinitError as error:
                yield from_error(directory, relative(directory, part.file), error)
                continue
            if far:
                yield Finding(relative(directory, part.file), f"tensor '{part.name}' is not Q + s B A: {far}")
        if step.changes:
            yield Checked("layer", step.name, 0)


def _check_copied(directory: Path, part: StoredTensor, tensor: StoredTensor) -> Iterator[Event]:
    yield from _check_finite(directory, part)
    try:
        same = all(torch.equal(a, b) for a, b in zip(part.chunks(), tensor.chunks(), strict=True))
    except CheckpointError as error:
        if not part.file.is_relative_to(directory) or str(part.file) not in str(error):
            raise
        return  # it was named
    if not same:
        yield Finding(relative(directory, part.file), f"tensor '{part.name}' is not the run's")


def _distance(stored: torch.Tensor, value: torch.Tensor) -> str:
    """Say how far two tensors of one type are from each other where that is more than rounding; "" where it is not."""
    if torch.equal(stored, value):
        return ""
    if not stored.dtype.is_floating_point:
        return f"{int((stored != value).sum())} of {value.numel()} values are others"
    least = 1e-6 * float(value.abs().max())
    close = torch.isclose(stored.float(), value.float(), rtol=2 * torch.finfo(value.dtype).eps, atol=least)
    others, beyond = int((stored != value).sum()), int((~close).sum())
    if not beyond and (value.dtype == torch.float32 or others <= FLIPPED * value.numel()):
        return ""
    norm = float((stored.float() - value.float()).norm() / value.float().norm())
    return f"{others} of {value.numel()} values are others, a relative distance of {norm:.1e}"
