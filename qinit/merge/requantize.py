"""Quantizes a merged model anew: a packed base without an adapter, solved as a run solves it, and what that costs.

The merged weights are written beside the place first, as any merge is, and removed at the end. Both steps go on where
they were broken off.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from qinit.adapters import ADAPTER_DIRECTORY
from qinit.clock import section
from qinit.errors import OutputError, QinitError, ReportError
from qinit.events import Event as RunEvent
from qinit.files.manifest import write_manifest
from qinit.machine import pick_device
from qinit.merge.plan import MergePlan
from qinit.merge.run import Event, Merged, merge
from qinit.plan.plan import Plan
from qinit.planner.make import make_plan
from qinit.recipe import Recipe, make_recipe
from qinit.report.averages import relative_error
from qinit.report.finish import base_config
from qinit.report.merged import MergeReport, write_merged_card
from qinit.runner.checked import check
from qinit.runner.job import Job
from qinit.runner.run import carried_out
from qinit.workplace.place import Workplace, check_free, check_space, require_space, working
from qinit.workplace.resume import opened

MERGED_NAME = "the merged model"
Told = Callable[[Plan], object]


def recipe_for(plan: MergePlan, bits: int, **options: Any) -> Recipe:
    """Return the recipe of quantizing anew: the run's own group size and calibration, method eqft, one width for all.
    Raises RecipeError for a width that there is not."""
    made = plan.report.recipe
    same = {key: made.get(key) for key in ("calibration", "calibration_samples", "calibration_length", "text_field")}
    calibrated = same["calibration"] not in (None, "none", "auto")
    if made.get("format") == "gptq":
        options["group_size"] = made.get("group_size")
    options = {"seed": made.get("seed"), "trust_remote_code": plan.weights.trust_remote_code, **options}
    return make_recipe(bits=bits, rank=1, polish=0, **(same if calibrated else {}), **options)


def requantize(
    plan: MergePlan, recipe: Recipe, out: Path, *, command: str = "", told: Told = lambda plan: None
) -> Generator[Event | RunEvent, None, None]:
    """Merge, quantize what came of it by `recipe` (of `recipe_for`) and put that at `out`; yields events, the last one
    is Merged. `told` is given the plan of the second step before it starts.

    Raises what `merge` and a run raise; then nothing is at `out`.
    """
    check_free(out, plan.run, plan.adapter)
    require_space(plan.nbytes + _requantized_bytes(plan, recipe.bits), out)
    whole = merged_place(out)
    if not _is_there(plan, whole):
        if whole.exists():
            raise OutputError(f"{whole}: is not the merge of these; remove it, or choose another place with --out")
        yield from (event for event in merge(plan, whole, command=command) if not isinstance(event, Merged))
    try:
        report = yield from _quantized(plan, recipe, whole, out, command, told)
    except QinitError as error:
        if not isinstance(error, OutputError):  # the same command would end in it again
            shutil.rmtree(whole)
        raise
    shutil.rmtree(whole)
    yield Merged(report, out)


def merged_place(out: Path) -> Path:
    """Return where the merged weights lie until they are quantized."""
    final = out.resolve()
    return final.with_name(f".{final.name}.merged")


def _quantized(
    plan: MergePlan, recipe: Recipe, whole: Path, out: Path, command: str, told: Told
) -> Generator[RunEvent, None, MergeReport]:
    made = without_adapters(make_plan(recipe, whole, MERGED_NAME))
    told(made)
    check_space(made, out)
    device = pick_device(recipe.device)
    with working(made, out, command) as place:
        check_free(out, whole)
        made, journal = yield from opened(made, place, device, overwrite=False)
        with closing(journal):
            job = Job(made, device, place, journal, None)
            yield from carried_out(job)
            (place.run / "config.json").write_text(json.dumps(base_config(job.plan), indent=2) + "\n", encoding="utf-8")
            with section("check"):
                checked = yield from check(job)
            report = _report(job, MergeReport.read(whole), checked, command)
            _complete(plan, report, place)
            place.finish()
    return report


def without_adapters(plan: Plan) -> Plan:
    """Return a plan whose layers get no adapter."""
    return replace(plan, layers=tuple(replace(layer, rank=0) for layer in plan.layers), whole=())


def _requantized_bytes(plan: MergePlan, bits: int) -> int:
    """Return about what the packed base takes, from the run's rows: half a bit more for scales and zero points."""
    rows = [row for row in plan.report.layers if row.kept is None]
    weights = sum(row.shape[0] * row.shape[1] for row in rows)
    rest = plan.weights.checkpoint.weight_bytes - sum(row.bytes_after for row in rows)
    return int(weights * (bits + 0.5) / 8) + max(rest, 0)


def _is_there(plan: MergePlan, whole: Path) -> bool:
    """Whether the merge was finished before the command was broken off."""
    try:
        found = MergeReport.read(whole)
    except ReportError:
        return False
    identity = plan.identity()
    same = all(getattr(found, key)["sha256"] == value for key, value in identity.items())
    return same and found.dtype == plan.dtype


def _report(job: Job, whole: MergeReport, checked: dict[str, Any] | None, command: str) -> MergeReport:
    made, rows = job.plan, tuple(job.store.rows[layer.target.name] for layer in job.plan.layers)
    found: dict[str, Any] = {
        "bits": made.recipe.bits,
        "format": made.recipe.format,
        "bits_per_weight": round(made.bits_per_weight, 4),
        "recipe": made.recipe.model_dump() | {"model": None, "rank": 0},
        "calibration": job.calibration,
        "error": relative_error(rows, "error"),
    }
    if any(row.output_error is not None for row in rows):
        found["output_error"] = relative_error(rows, "output_error")
    if checked is not None:
        found["check"] = checked
    keys = ("name", "bits", "group_size", "error", "output_error", "kept")
    found["layers"] = [{key: getattr(row, key) for key in keys} for row in rows]
    totals = {**whole.totals, "tensors": len(made.base_specs), "bytes": made.base_bytes}
    totals["seconds"] = round(whole.totals["seconds"] + job.journal.seconds, 3)
    totals["peak_memory_bytes"] = max(whole.totals["peak_memory_bytes"], job.journal.peak_memory_bytes)
    notes = (*whole.notes, *made.exceptions, *job.notes)
    return replace(whole, command=command, totals=totals, notes=notes, requantized=found)


def _complete(plan: MergePlan, report: MergeReport, place: Workplace) -> None:
    (place.run / ADAPTER_DIRECTORY).rmdir()  # empty
    report.write(place.run)
    write_merged_card(place.run, report, plan.weights.checkpoint.card_metadata())
    write_manifest(place.run)
