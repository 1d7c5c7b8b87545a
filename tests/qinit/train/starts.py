"""Plans and starts of tiny models, as a polish begins with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qinit.grids import GRIDS
from qinit.plan.plan import Plan
from qinit.runner.layer import read_weight
from qinit.solver.solve import solve
from qinit.solver.spec import seed_of
from qinit.text.samples import Samples
from qinit.train.polish import Polished, polish
from qinit.train.student import Start, student_of
from qinit.train.teacher import Lessons, teach
from tests.helpers import calibrated_plan, exhausted, random_samples

CPU = torch.device("cpu")
Starts = Mapping[str, Start]


def text(samples: int = 9, length: int = 16) -> Samples:
    return random_samples(samples, length)


def begin(directory: Path, names: Collection[str] | None = None) -> tuple[Plan, dict[str, Start]]:
    """Return the plan of a checkpoint with 2 bits, and the starts of its layers, or of those called `names`: data-free,
    as codes."""
    plan = calibrated_plan(directory, bits=2, iter=1)
    starts = {}
    for layer in plan.quantized:
        name = layer.target.name
        if names is None or name in names:
            spec = replace(plan.data_free_spec(layer), iterations=1, storage=None)
            solution = solve(read_weight(layer, CPU), spec, seed_of(name, 0))
            assert solution.low_rank is not None
            starts[name] = Start(solution.quantized, solution.low_rank)
    return plan, starts


def weight_of(start: Start) -> torch.Tensor:
    """Q [out, in] in float32."""
    return start.base.float() if isinstance(start.base, torch.Tensor) else GRIDS["int"].dequantize(start.base)


def dense(starts: Starts, dtype: torch.dtype = torch.float32) -> dict[str, Start]:
    """The same starts with Q as weights."""
    return {name: replace(start, base=weight_of(start).to(dtype)) for name, start in starts.items()}


def taught(plan: Plan, samples: Samples, place: Path) -> Lessons:
    """What the source makes of a text, kept below `place`."""
    return exhausted(teach(plan, samples, CPU, place / "lessons", place))[0]


def polished(plan: Plan, starts: Starts, samples: Samples | None = None, **options: Any) -> tuple[list[Any], Polished]:
    """Polish, 20 steps of 4 samples unless told otherwise; returns the events and the result."""
    samples = text() if samples is None else samples
    options = {"steps": 20, "seed": 0, "batch_size": 4, **options}
    with TemporaryDirectory() as place, student_of(plan, starts, CPU) as student:
        lessons = taught(plan, samples, Path(place))
        result, events = exhausted(polish(student, lessons, samples, **options))
    return events, result


def same(one: Polished, other: Polished) -> bool:
    """Whether two results have the same bits."""
    return one.layers.keys() == other.layers.keys() and all(
        torch.equal(mine.low_rank.A, its.low_rank.A)
        and torch.equal(mine.low_rank.B, its.low_rank.B)
        and (mine.scales is its.scales if its.scales is None else torch.equal(mine.scales, its.scales))
        for mine, its in ((one.layers[name], other.layers[name]) for name in one.layers)
    )
