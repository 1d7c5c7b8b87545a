"""Carries out a merge: one tensor at a time, beside its place, with a journal, as a run does.

A merge that was killed keeps what it has written, and the same command goes on from there and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qinit.errors import CheckpointError, OutputError
from qinit.events import Discarded, Done, Resumed, Working
from qinit.files.manifest import write_manifest
from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.files.writer import SafetensorsWriter
from qinit.machine import processor, versions
from qinit.merge.plan import MergePlan
from qinit.merge.steps import Step
from qinit.report.merged import MergedRow, MergeReport, write_merged_card
from qinit.source.checkpoint import count_nonfinite, require_finite
from qinit.words import moment
from qinit.workplace.journal import Journal, Record, kept_words
from qinit.workplace.place import Workplace, check_free, require_space, working_on
from qinit.workplace.signature import NO_MATTER, differences


@dataclass(frozen=True)
class Merged:
    """The merge is complete and in its place."""

    report: MergeReport
    directory: Path


Event = Resumed | Discarded | Working | Done | Merged


def merge(plan: MergePlan, out: Path, *, command: str = "") -> Generator[Event, None, None]:
    """Carry out a merge and put the result at `out`; yields events, the last one is Merged.

    Raises OutputError for a place that is taken, too small or cannot be written to, or while another merge is at work
    on it, and CheckpointError for a damaged tensor and for a weight that the type does not hold; then nothing is at
    `out`.
    """
    check_place(plan, out)
    with working_on(out, command, lambda: plan.nbytes) as place:
        check_free(out)  # another merge may just have ended
        journal = yield from _opened(plan, place)
        with closing(journal):
            yield from _written(plan, place, journal)
            report = _report(plan, journal, command)
            _complete(plan, report, place.run)
            place.finish()
    yield Merged(report, out)


def check_place(plan: MergePlan, out: Path) -> None:
    """Raise OutputError if the result cannot go to `out`."""
    check_free(out, plan.run, plan.adapter)
    require_space(plan.nbytes, out)


def _signature(plan: MergePlan) -> dict[str, Any]:
    """Return what the bytes depend on, by names that a user knows."""
    found: dict[str, Any] = dict(plan.identity())
    found |= {"dtype": plan.dtype, "shards of at most": plan.max_shard_bytes}
    for file in sorted({tensor.file for tensor in plan.weights.checkpoint.tensors.values()}):
        stat = file.stat()
        found[f"the run's {file.name}"] = f"{stat.st_size} bytes of {stat.st_mtime_ns} ns"
    found |= {f"version of {name}": value for name, value in versions().items() if name not in NO_MATTER}
    found["threads (OMP_NUM_THREADS)"] = torch.get_num_threads()
    return found


def _opened(plan: MergePlan, place: Workplace) -> Generator[Event, None, Journal]:
    """Open the journal of an unfinished merge of the same, or a new one. Raises OutputError for one of something
    else."""
    steps, signature = plan.layout.steps, _signature(plan)
    journal = Journal.open(place.journal) if place.run.is_dir() else None
    if journal is not None:
        changed = differences(journal.header["signature"], signature)
        if not changed:
            done = {record["name"] for record in journal.records if record["kind"] == "merged"}
            nbytes = sum(step.nbytes for step in steps if step.name in done)
            yield Resumed(len(done), len(steps), nbytes, journal.header["since"])
            return journal
        left, since = kept_words(place.journal), moment(journal.header["since"])
        journal.close()
        if left:
            raise OutputError(
                f"{place.out}: an unfinished run or merge of something else lies there, started {since} ({left}): "
                f"{'; '.join(changed)}; ask for the same again, remove {place.partial}, or choose another place with "
                "--out"
            )
    place.clear()
    place.run.mkdir()
    header = {
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "layers": len(steps),
        "signature": signature,
        "processor": processor(),
        "calibration_reason": "",
    }
    return Journal.create(place.journal, header)


def _written(plan: MergePlan, place: Workplace, journal: Journal) -> Iterator[Event]:
    layout = plan.layout
    writer = SafetensorsWriter(place.run, layout.specs, max_bytes=plan.max_shard_bytes, split=layout.split)
    sums = {record["name"]: record["sums"] for record in journal.records if record["kind"] == "merged"}
    for step in layout.steps:
        names = [spec.name for spec in step.places]
        if step.name in sums and _holds(writer, names, sums[step.name]):
            for name in names:
                writer.keep(name)
            continue
        yield Working(step.name, step.nbytes)
        record: Record = {"kind": "merged", "name": step.name}
        if step.is_plain:
            pairs = zip(step.places, step.tensors, strict=True)
            written = [writer.write_chunks(place.name, _chunks(plan, tensor, place)) for place, tensor in pairs]
        else:
            written, row = _merged(plan, step, writer)
            record["row"] = None if row is None else asdict(row)
        journal.append({**record, "sums": written}, sync=False)
        yield Done(step.name, step.nbytes, None)
    writer.close()
    journal.sync()


def _holds(writer: SafetensorsWriter, names: list[str], sums: list[int]) -> bool:
    return len(names) == len(sums) and all(
        writer.checksum(name) == value for name, value in zip(names, sums, strict=True)
    )


def _merged(plan: MergePlan, step: Step, writer: SafetensorsWriter) -> tuple[list[int], MergedRow | None]:
    """Write one value; returns the checksums, and the row where the adapter changes it."""
    before = step.value(plan.weights)
    value = _changed(before, step)
    parts = step.split(value)
    for place, part in zip(step.places, parts, strict=True):
        _require_held(plan, place, count_nonfinite(part))
    written = [writer.write(place.name, part) for place, part in zip(step.places, parts, strict=True)]
    if not step.changes:
        return written, None
    stored = torch.cat([part.float() for part in parts], dim=step.side)
    rounding = float(stored.sub_(value).norm()) / (float(value.norm()) or 1.0)
    del stored
    length = float(before.norm()) or 1.0
    change = float(before.sub_(value).norm()) / length
    how = "; ".join(each.words for each in step.changes)
    return written, MergedRow(step.name, tuple(value.shape), how, change, rounding)


def merged_value(plan: MergePlan, step: Step) -> torch.Tensor:
    """Return W' of a step, float32, in the layout of its places."""
    return _changed(step.value(plan.weights), step)


def _changed(value: torch.Tensor, step: Step) -> torch.Tensor:
    for change in step.changes:
        value = change.made(value)
    return value


def _chunks(plan: MergePlan, tensor: StoredTensor, place: TensorSpec) -> Iterator[torch.Tensor]:
    """Yield a tensor's bytes in the type of its place."""
    for chunk in tensor.chunks():
        values = chunk.view(tensor.dtype)
        require_finite(tensor, count_nonfinite(values))
        found = values.to(place.dtype)
        _require_held(plan, place, count_nonfinite(found))
        yield found.view(torch.uint8)


def _require_held(plan: MergePlan, place: TensorSpec, bad: int) -> None:
    """Raise CheckpointError where `bad` of a place's values are no finite ones in its type."""
    if bad:
        dtype = str(place.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{plan.run}: '{place.name}' merged has {bad} values that {dtype} does not hold, or that are no numbers; "
            "--dtype float32 or bfloat16 hold more, and `qinit verify --adapter` looks at the adapter"
        )


def _report(plan: MergePlan, journal: Journal, command: str) -> MergeReport:
    found = {record["name"]: record["row"] for record in journal.records if record.get("row")}
    rows = [MergedRow(**{**row, "shape": tuple(row["shape"])}) for row in found.values()]
    weights = [torch.Size(row.shape).numel() for row in rows]
    dtypes = dict.fromkeys(str(spec.dtype).removeprefix("torch.") for spec in plan.layout.specs)
    totals = {
        "tensors": len(plan.layout.specs),
        "bytes": plan.weight_bytes,
        "dtypes": list(dtypes),
        "change": _average([row.change for row in rows], weights),
        "rounding": _average([row.rounding for row in rows], weights),
        "seconds": round(journal.seconds, 3),
        "peak_memory_bytes": journal.peak_memory_bytes,
    }
    report, identity = plan.report, plan.identity()
    source = {**report.source, "trust_remote_code": bool(report.recipe.get("trust_remote_code"))}
    run = {"sha256": identity["run"], "bits": report.totals.get("nominal_bits"), "format": report.recipe.get("format")}
    adapter = {"sha256": identity["adapter"], "own": plan.own, "peft_type": plan.settings.get("peft_type")}
    made_by = versions()
    return MergeReport(
        "merge", report.model, command, source, run, adapter, plan.dtype, made_by, totals, plan.notes, tuple(rows)
    )


def _average(values: list[float], weights: list[int]) -> float:
    """Root mean square, each parameter by its size."""
    total = sum(weight * value * value for value, weight in zip(values, weights, strict=True))
    return (total / sum(weights)) ** 0.5 if weights else 0.0


def _complete(plan: MergePlan, report: MergeReport, directory: Path) -> None:
    """Write all that stands beside the tensors; the last file is the list of all with their sums."""
    checkpoint = plan.weights.checkpoint
    for relative in plan.companions:
        (directory / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.directory / relative, directory / relative)
    (directory / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    report.write(directory)
    write_merged_card(directory, report, checkpoint.card_metadata())
    write_manifest(directory)
