"""Opens the journal of a run: that of an unfinished run with the same signature, or a new one."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from datetime import UTC, datetime

import torch

from qinit.errors import OutputError
from qinit.events import Discarded, Event, Resumed
from qinit.machine import processor
from qinit.plan.plan import Plan
from qinit.words import moment
from qinit.workplace.journal import Journal, finished_layers, kept_words
from qinit.workplace.place import Workplace
from qinit.workplace.signature import differences, signature


def opened(
    plan: Plan, place: Workplace, device: torch.device, *, overwrite: bool, polished: str | None = None
) -> Generator[Event, None, tuple[Plan, Journal]]:
    """Go on with the unfinished run in `place`, or start anew where there is none; returns the plan, with what
    `--calibration auto` became when the run was started, and the journal. `polished` names the finished run that is
    polished further.

    Raises OutputError for an unfinished run that something else was asked of; with `overwrite`, or where nothing of it
    is worth keeping, it is removed instead.
    """
    journal = Journal.open(place.journal) if place.run.is_dir() else None  # else it was finished, and only not removed
    if journal is not None:
        plan = _as_started(plan, journal)
        changed = differences(journal.header["signature"], signature(plan, device, polished))
        if not changed:
            yield _resumed(plan, journal)
            return plan, journal
        left, since = kept_words(place.journal), moment(journal.header["since"])
        journal.close()
        if left and not overwrite:
            raise OutputError(
                f"{place.out}: an unfinished run for something else lies there, started {since} ({left}): "
                f"{'; '.join(changed)}; to go on with it ask for the same again, to start anew pass --overwrite, or "
                "choose another place with --out"
            )
        if left:
            yield Discarded(f"an unfinished run of {since} was for something else ({'; '.join(changed)})")
    elif place.run.is_dir() and place.journal.exists():
        yield Discarded("the journal of an unfinished run is damaged")
    place.clear()
    place.run.mkdir()
    header = {
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "layers": len(plan.layers),
        "signature": signature(plan, device, polished),
        "processor": processor(),
        "calibration_reason": plan.calibration_reason,
    }
    return plan, Journal.create(place.journal, header)


def moved(journal: Journal) -> str | None:
    """Return what to note where a run goes on on another processor, whose last bits may be others."""
    then, now = journal.header["processor"], processor()
    if then == now:
        return None
    return f"started on another processor ({then}, now {now}), so that last bits may differ from those of a run on one"


def _as_started(plan: Plan, journal: Journal) -> Plan:
    """Give `auto` the meaning that it had when the run was started: it depends on the memory that is free."""
    reason = journal.header["calibration_reason"]
    if not (plan.calibration_reason and reason):
        return plan
    then = {key: journal.header["signature"].get(key) for key in ("calibration", "calibration_samples")}
    recipe = plan.recipe.model_copy(update=then)
    return replace(plan, recipe=recipe, calibration_reason=reason)


def _resumed(plan: Plan, journal: Journal) -> Resumed:
    layers = finished_layers(journal.records)
    nbytes = sum(layer.target.nbytes for layer in plan.layers if layer.target.name in layers)
    copied = {record["name"] for record in journal.records if record["kind"] == "copied"}
    nbytes += sum(tensor.nbytes for tensor in plan.copied if tensor.name in copied)
    return Resumed(len(layers), len(plan.layers), nbytes, journal.header["since"])
