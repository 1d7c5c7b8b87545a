"""From the report of a finished run to a plan of the same layers, to polish them further; reads headers and
configuration only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qinit.errors import CheckpointError, RecipeError, ReportError
from qinit.files.tensors import TensorSpec
from qinit.formats import FORMATS
from qinit.plan.allocation import Allocation
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.planner.settled import with_whole
from qinit.recipe import BUNDLED, Recipe, make_recipe
from qinit.report.report import REPORT_NAME, LayerRow, Report
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import Target, expert_targets, read_architecture, resolve_targets
from qinit.text.sources import check_source

STEPS = 100
TEXT_OPTIONS = ("calibration", "calibration_samples", "calibration_length", "text_field", "seed")


def recipe_of(report: Report, run: Path, *, trust_remote_code: bool = False) -> Recipe:
    """Return the recipe that a report says its run was made by. Raises ReportError for one that is none of this
    qinit's."""
    try:  # whether code is run is for the command line to say, not for a file
        return make_recipe(**{**report.recipe, "trust_remote_code": trust_remote_code})
    except RecipeError as error:
        raise ReportError(f"{run / REPORT_NAME}: recipe: {error}; this qinit cannot go on from it") from None


def polish_recipe(
    made_by: Recipe,
    *,
    steps: int = STEPS,
    calibration: str | None = None,
    calibration_samples: int | None = None,
    calibration_length: int | None = None,
    text_field: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    check: bool = True,
) -> Recipe:
    """Return the recipe of a polish of `steps` steps of a run: on text of the source that the run's calibration has, or
    that qinit brings where it has none, unless another is given. All else is the run's. Raises RecipeError."""
    if steps < 1:
        raise RecipeError(f"steps: expected at least 1, found {steps}")
    if calibration in ("none", "auto"):
        raise RecipeError(f"calibration: a polish needs text (self, text, a text file, ...), found {calibration}")
    own = made_by.calibration if made_by.calibrated else BUNDLED
    source = calibration or own
    asked = make_recipe(
        polish=steps,
        calibration=source,
        calibration_samples=made_by.calibration_samples if calibration_samples is None else calibration_samples,
        calibration_length=made_by.calibration_length if calibration_length is None else calibration_length,
        text_field=text_field or (made_by.text_field if source == own else None),
        seed=made_by.seed if seed is None else seed,
        device=device,
        check=check,
    )
    changed = {key: getattr(asked, key) for key in (*TEXT_OPTIONS, "polish", "device", "check")}
    return made_by.model_copy(update=changed)  # unchecked: a method that looks at weights alone can be polished too


def plan_again(report: Report, recipe: Recipe, run: Path, source: Path) -> Plan:
    """Plan the layers of a finished run once more, at the widths and ranks that they have, with the model in `source`
    that it was made from.

    Raises CheckpointError for another model, as far as headers and configuration show it, and what `check_source`
    does.
    """
    checkpoint = Checkpoint.open(source)
    architecture = read_architecture(checkpoint, recipe.trust_remote_code)
    _require(run, source, "the class of the model", report.source.get("class"), architecture.class_name)
    _require(run, source, "bytes of weights", report.totals.get("bytes_before"), checkpoint.weight_bytes)
    found = (*resolve_targets(checkpoint, architecture), *expert_targets(checkpoint, architecture))
    targets = {target.name: target for target in found}
    for row in report.layers:
        target = targets.get(row.name)
        shape = None if target is None else (target.module.out_features, target.module.in_features)
        _require(run, source, f"the shape of {row.name}", tuple(row.shape), shape)
        _require(run, source, f"the bytes of {row.name}", row.bytes_before, targets[row.name].nbytes)
        if row.kept is None and None in (row.bits, row.group_size):
            raise _damaged(run, f"{row.name} has neither a width nor a reason why it was kept")
    layers = tuple(_layer(recipe, targets[row.name], row) for row in report.layers)
    plan = with_whole(Plan(recipe, report.model, checkpoint, architecture, layers))
    if not plan.quantized:
        raise _damaged(run, "no layer is quantized")
    for layer, row in zip(layers, report.layers, strict=True):
        if layer.bytes_after != row.bytes_after:
            raise _damaged(run, f"{row.name}: bytes_after: expected {layer.bytes_after}, found {row.bytes_after}")
    check_source(
        recipe.calibration,
        source,
        checkpoint.config,
        recipe.text_field,
        trust_remote_code=recipe.trust_remote_code,
    )
    return replace(plan, allocation=_allocation(report)) if recipe.mixed else plan


def another_model(run: Path, source: Path, what: str) -> CheckpointError:
    """Return the error for a source that the run was not made from."""
    return CheckpointError(
        f"{source}: is not the model that {run} was made from: {what}; give that one with --model (a directory or a "
        "Hub id)"
    )


def _damaged(run: Path, what: str) -> ReportError:
    return ReportError(f"{run / REPORT_NAME}: {what}; `qinit verify {run}` says what else is wrong")


def _require(run: Path, source: Path, what: str, expected: object, found: object) -> None:
    if expected != found:
        raise another_model(run, source, f"{what}: expected {expected}, found {'none' if found is None else found}")


def _layer(recipe: Recipe, target: Target, row: LayerRow) -> LayerPlan:
    """Return a row's layer as it was planned when the run was made."""
    if row.kept is not None:
        same = TensorSpec(target.tensor.name, target.tensor.dtype, target.tensor.shape)
        group_size = min(recipe.group_size, target.module.in_features)
        return LayerPlan(target, recipe.widths[0], group_size, row.rank, row.kept, (same,))
    assert row.bits is not None
    assert row.group_size is not None
    specs = tuple(FORMATS[recipe.format].specs(target, row.bits, row.group_size))
    return LayerPlan(target, row.bits, row.group_size, row.rank, None, specs)


def _allocation(report: Report) -> Allocation:
    """Say of mixed widths that they are known; what was measured stays in the report."""
    found = report.totals.get("allocation")
    how, metric = (found.get(key) if isinstance(found, dict) else None for key in ("allocation", "metric"))
    return Allocation(str(how), str(metric))
