"""What a run tells while it is under way; the command line draws it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qinit.plan.plan import Plan
from qinit.report.report import LayerRow, Report


@dataclass(frozen=True)
class Resumed:
    """An unfinished run is gone on with: `layers` of `total` were finished, `nbytes` of the source's; it was started
    at `since` (ISO 8601)."""

    layers: int
    total: int
    nbytes: int
    since: str


@dataclass(frozen=True)
class Discarded:
    """What an unfinished run had left was removed; `reason` says why."""

    reason: str


@dataclass(frozen=True)
class Working:
    """A tensor has been taken up; `nbytes` is its size in the source."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Done:
    """A tensor has been written; `row` is its result, None for one that was copied."""

    name: str
    nbytes: int
    row: LayerRow | None


@dataclass(frozen=True)
class Finished:
    """The run is complete and in its place."""

    report: Report
    directory: Path


@dataclass(frozen=True)
class Unchanged:
    """A finished run was polished further and nothing was gained: it is as it was, and nothing was written."""

    report: Report
    directory: Path


@dataclass(frozen=True)
class Sampling:
    """The calibration text is being read or written."""

    source: str


@dataclass(frozen=True)
class Allotted:
    """Every layer's width is known; `plan` has them."""

    plan: Plan


@dataclass(frozen=True)
class Noted:
    """Something that a user should know has turned up; it is in the report too."""

    text: str


@dataclass(frozen=True)
class Measuring:
    """A pass over the calibration text is under way for `layers` of block `block` of `blocks`."""

    block: int
    blocks: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Passing:
    """The calibration text runs through block `block` of `blocks`."""

    block: int
    blocks: int


@dataclass(frozen=True)
class Reading:
    """The source has read the text of the polish with `done` of its `blocks`."""

    done: int
    blocks: int


@dataclass(frozen=True)
class Checking:
    """What was written is being measured against the original: `done` of `total` blocks or windows of a `step`."""

    step: str
    done: int
    total: int


@dataclass(frozen=True)
class Progress:
    """One optimizer step has been made. `loss` is that of its batch, `held_out` that of the held-out samples where
    it was measured; both are KL in nats per token plus a multiple of the relative squared error of the last hidden
    state. Step 0 is the start."""

    step: int
    loss: float
    held_out: float | None


Event = (
    Resumed
    | Discarded
    | Sampling
    | Measuring
    | Passing
    | Allotted
    | Noted
    | Working
    | Done
    | Reading
    | Progress
    | Checking
    | Finished
    | Unchanged
)
