"""Polishes a finished run further: its tensors are taken over as they are, and adapters and scales trained on."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qinit.clock import section
from qinit.errors import CheckpointError, HubError, OutputError, ReportError
from qinit.events import Done, Event, Finished, Unchanged, Working
from qinit.files.manifest import MANIFEST_NAME, file_sum
from qinit.files.tensors import StoredTensor
from qinit.hub.download import local_directory
from qinit.machine import pick_device
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.planner.again import another_model, plan_again, polish_recipe, recipe_of
from qinit.planner.polish import brings_text
from qinit.recipe import Recipe
from qinit.report.card import polish_words
from qinit.report.report import REPORT_NAME, LayerRow, Report
from qinit.runner.before import Before
from qinit.runner.job import Job
from qinit.runner.layer import read_weight
from qinit.runner.polished import polish_adapters
from qinit.runner.run import completed
from qinit.solver.residual import relative_errors, same_error
from qinit.source.demo import DEMO_NAME, demo_directory
from qinit.workplace.journal import read_journal
from qinit.workplace.place import Workplace, check_output, put_back, working
from qinit.workplace.resume import moved, opened
from qinit.workplace.signature import signature

STALE = ("evaluations", "tasks", "check", "output_error_start", "output_error")  # said of the run as it was
OLD_EVALUATIONS = "evaluations from before the polish are left out; `qinit eval` makes them anew"


@dataclass(frozen=True)
class PolishPlan:
    """What a polish will do: `before` is the run that it starts from, `made_by` that run's recipe, and `plan` has the
    run's layers with the recipe of the polish."""

    before: Before
    made_by: Recipe
    plan: Plan

    def in_place(self, out: Path) -> bool:
        """Whether the run itself is replaced where the result goes to `out`."""
        return out.resolve() == self.before.directory.resolve()


def plan_polish(
    directory: Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PolishPlan:
    """Open a finished run and the model that it was made from, `model` (a directory or a Hub id) or the one that its
    report names, and plan a polish; `options` are those of `polish_recipe`. No weight is computed with.

    Raises ReportError for what is no finished run, is damaged or trained, CheckpointError for another model,
    RecipeError, CalibrationError and HubError.
    """
    put_back(directory)
    before = Before.open(directory)
    _require_sound(before)
    made_by = recipe_of(before.report, directory, trust_remote_code=trust_remote_code)
    recipe = polish_recipe(made_by, **options)
    pick_device(recipe.device)  # before anything is fetched
    try:
        source = _source(before, model, revision, token)
        plan = plan_again(before.report, recipe, directory, source)
    except (CheckpointError, HubError) as error:
        if model is None and "--model" not in str(error):
            error.add_note(f"{directory} was made from it: say where it is now with --model")
        raise
    brought = options.get("calibration") is None and brings_text(plan)  # who names a source gets that
    return PolishPlan(before, made_by, replace(plan, polish_brought=brought))


def polish_run(
    directory: Path,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    command: str = "",
    token: str | None = None,
    **options: Any,
) -> Generator[Event, None, None]:
    """Polish a finished run further and put the result in its place, or at `out`; yields events, the last one is
    Finished, or Unchanged where nothing was gained. `options` are those of `plan_polish`."""
    yield from polish_planned(
        plan_polish(directory, token=token, **options), out, overwrite=overwrite, command=command, token=token
    )


def polish_planned(
    again: PolishPlan, out: Path | None = None, *, overwrite: bool = False, command: str = "", token: str | None = None
) -> Generator[Event, None, None]:
    """Carry out a polish; yields events, the last one is Finished, or Unchanged where nothing was gained.

    The result takes the run's place at the end, in one step, or goes to `out`. Broken off, it goes on as a run does
    and ends with the same bytes. Raises OutputError (also where files in the run's directory would be lost),
    CheckpointError for a model that the run was not made from, and CalibrationError; then the run is as it was.
    """
    before, plan = again.before, again.plan
    place_of = out or before.directory
    in_place = again.in_place(place_of)
    check_place(again, place_of, overwrite)
    device = pick_device(plan.recipe.device)
    with working(plan, place_of, command) as place:
        before.require_listed()  # another polish may just have ended
        check_output(plan, place_of, overwrite or in_place)
        if in_place and _had_ended(again, place, device):
            report: Report | None = before.report
        else:
            report = yield from _carried_out(again, place, device, command, token, overwrite=overwrite)
    yield Unchanged(before.report, before.directory) if report is None else Finished(report, place_of)


def _carried_out(
    again: PolishPlan, place: Workplace, device: torch.device, command: str, token: str | None, *, overwrite: bool
) -> Generator[Event, None, Report | None]:
    """Polish and put the result in its place; returns its report, None where nothing was gained."""
    before, in_place = again.before, again.in_place(place.out)
    plan, journal = yield from opened(again.plan, place, device, overwrite=overwrite, polished=before.identity)
    with closing(journal):
        job = Job(plan, device, place, journal, token)
        if (elsewhere := moved(journal)) is not None:
            yield job.note(elsewhere)
        yield from _taken_over(job, before)
        with section("polish"):
            yield from polish_adapters(job)
        if not job.calibration["polish"]["kept"]:
            return None
        job.store.close()
        before.copy_others(place.run)
        report = yield from _completed(job, again, command)
        if in_place:
            before.require_replaceable(plan)
            before.require_unchanged()
        journal.append({"kind": "ended", "run": file_sum(place.run / MANIFEST_NAME)})
        with section("writing"):
            place.finish()
    return report


def _had_ended(again: PolishPlan, place: Workplace, device: torch.device) -> bool:
    """Whether the run is what this polish has made of it, so that only the rest of its workplace is to be removed: it
    was killed behind its last step, and is not to be made twice."""
    records = read_journal(place.journal)
    if place.run.exists() or not records or records[-1]["kind"] != "ended":
        return False
    then, now = records[0]["signature"], signature(again.plan, device)
    same = all(then.get(key) == value for key, value in now.items())
    return same and records[-1]["run"] == file_sum(again.before.directory / MANIFEST_NAME)


def check_place(again: PolishPlan, out: Path, overwrite: bool) -> None:
    """Raise OutputError if the result cannot go to `out`, or if something would be lost there."""
    run, place = again.before.directory.resolve(), out.resolve()
    if place == run:
        again.before.require_replaceable(again.plan)
    elif run in place.parents or place in run.parents:
        raise OutputError(f"{out}: holds or lies in the run {again.before.directory}; choose another place with --out")
    check_output(again.plan, out, overwrite or place == run)


def _require_sound(before: Before) -> None:
    """Raise ReportError where the report says of an earlier polish what qinit does not write."""
    polish = _part(_part(before.report.totals, "calibration"), "polish")
    try:
        if polish:
            polish_words(polish)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{before.directory / REPORT_NAME}: totals.calibration.polish is not what qinit writes "
            f"({type(error).__name__}: {error}); make the run again with `qinit eqft`"
        ) from None


def _source(before: Before, model: str | None, revision: str | None, token: str | None) -> Path:
    """Find the model that a run was made from, of a Hub id the same revision, unless another is named."""
    made_from = before.report.source
    name = str(made_from.get("model")) if model is None else model
    embedded = before.report.recipe.get("model") is None if model is None else not Path(name).is_dir()
    if name == DEMO_NAME and embedded:
        return demo_directory()
    own = made_from.get("revision")
    if revision is None and isinstance(own, str) and name == made_from.get("model") and not Path(name).is_dir():
        revision = own
    return local_directory(name, revision, token)


def _taken_over(job: Job, before: Before) -> Generator[Event, None, None]:
    """Write the run's tensors as they are, but for what is finished already, each compared with the source's."""
    plan, store = job.plan, job.store
    tensors, rows = before.tensors(plan), {row.name: row for row in before.report.layers}
    for tensor, layer in store.left():
        name = tensor.name
        yield Working(name, tensor.nbytes if layer is None else layer.target.nbytes)
        if layer is None:
            store.copy(name, _same(before, tensors[name], tensor))
        else:
            if layer.kept is not None:
                store.copy_weight(layer, _same(before, tensors[name], tensor))
            _take_over(job, before, layer, tensors, rows[layer.target.name])
        yield Done(name, tensor.nbytes if layer is None else layer.target.nbytes, None)
    store.copy_whole(StoredTensor.chunks)
    store.sync()


def _take_over(job: Job, before: Before, layer: LayerPlan, tensors: dict[str, StoredTensor], row: LayerRow) -> None:
    """Write a layer as it is. Raises CheckpointError where it is not as far from the source as reported."""
    plan = job.plan
    specs = layer.specs if layer.kept is None else ()
    names = [*(spec.name for spec in specs), *plan.adapter.names(layer.target.module, layer.rank)]
    job.store.put(layer, {name: tensors[name].read() for name in names}, row)
    if layer.kept is not None or row.error_start is None or row.error is None:
        return
    low_rank = job.store.low_rank(layer).to(job.device)
    found = relative_errors(read_weight(layer, job.device), job.store.quantized(layer, device=job.device), low_rank)
    if not (same_error(found[0], row.error_start) and same_error(found[1], row.error)):
        what = f"{row.name}: expected the errors {row.error_start:.6f} and {row.error:.6f}, found "
        raise another_model(before.directory, plan.checkpoint.directory, f"{what}{found[0]:.6f} and {found[1]:.6f}")


def _same(before: Before, written: StoredTensor, original: StoredTensor) -> Iterator[torch.Tensor]:
    """Yield a copied tensor's bytes. Raises CheckpointError where they are not the source's."""
    for found, expected in zip(written.chunks(), original.chunks(), strict=True):
        if not torch.equal(found, expected):
            what = f"tensor '{original.name}' has other values"
            raise another_model(before.directory, original.file.parent, what)
        yield found


def _completed(job: Job, again: PolishPlan, command: str) -> Generator[Event, None, Report]:
    """Measure and describe what has come of the run, which is by its own recipe what it was."""
    old, polish = again.before.report, job.plan.recipe
    if any(old.totals.get(key) for key in ("evaluations", "tasks")):
        yield job.note(OLD_EVALUATIONS)
    own = {key: getattr(polish, key) for key in ("polish", "device", "check")}
    job.plan = replace(job.plan, recipe=again.made_by.model_copy(update=own))
    return (yield from completed(job, command, lambda made: _revised(old, job.notes, made)))


def _revised(old: Report, notes: list[str], made: Report) -> Report:
    """Return the report of a polished run: what the polish has changed, beside what was said of the run before."""
    kept = {key: value for key, value in old.totals.items() if key not in STALE}
    totals = {**kept, **made.totals}
    if "allocation" in kept:
        totals["allocation"] = kept["allocation"]
    totals["seconds"] = round(_number(kept, "seconds") + made.totals["seconds"], 3)
    totals["peak_memory_bytes"] = max(_number(kept, "peak_memory_bytes"), made.totals["peak_memory_bytes"])
    polish = made.totals["calibration"]["polish"] | _distances(old, made)
    totals["calibration"] = _calibration(_part(kept, "calibration"), polish)
    said = [note for note in old.notes if not note.startswith("check: ")]
    return replace(
        made,
        command="\n".join(filter(None, (old.command, made.command))),
        recipe={**old.recipe, "check": made.recipe["check"]},
        source=old.source,
        totals=totals,
        notes=tuple(dict.fromkeys((*said, *notes))),
    )


def _distances(old: Report, made: Report) -> dict[str, Any]:
    """Return the KL from the original before and after, and the tokens of one text that each was measured on."""
    before, after = (_part(report.totals, "check") for report in (old, made))
    if before.get("text") != after.get("text") or not all(type(each.get("kl")) is float for each in (before, after)):
        return {}
    return {"kl": {"before": before["kl"], "after": after["kl"], "tokens": [before["tokens"], after["tokens"]]}}


def _calibration(old: dict[str, Any], polish: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of the text, with the earlier polishes beside the last one, the first of them first."""
    last = _part(old, "polish")
    own = {key: value for key, value in last.items() if key != "earlier"}
    earlier = [*(last.get("earlier") or []), own] if last else []
    return {**old, "polish": {**polish, "earlier": earlier}}


def _part(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a part of a report, empty where it has none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _number(values: dict[str, Any], key: str) -> Any:
    found = values.get(key)
    return found if type(found) in (int, float) else 0
