"""Which width, and which rank, each layer gets under a budget."""

from __future__ import annotations

import ctypes
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qinit.errors import RecipeError
from qinit.plan.allocation import Option

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What serving engines fuse into one matrix, so that it must have one width.
FUSED = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value")),
    *(("q", "k", "v"), ("wi_0", "wi_1"), ("q_lin", "k_lin", "v_lin")),
)
FRONT_POINTS = 17
FRONT_GAP, FRONT_GAP_OF_TWO = 1e-4, 5e-3  # relative: it is for a picture, and two budgets take far longer
ROUNDING = 1e-12  # of a budget: what a sum of sizes may be off by
OBJECTIVE = 1e3  # of all losses together; the solver stops 1e-6 from the best
CUTS = 10  # how often an allocation that exceeds a budget by less than the solver's tolerance is forbidden
NODES = 10**5  # where the solver takes the best so far; no time limit, as the same input gives the same widths


@dataclass(frozen=True)
class Choice:
    """What a layer may get: its stored size in bits, its adapter's in bytes, and the loss in nats per token that it is
    predicted to add (0 where nothing was measured). Where one budget is for both, the first has the second in it."""

    option: Option
    stored_bits: float
    adapter_bytes: int
    nats: float = 0.0


@dataclass(frozen=True)
class Item:
    """A layer, or layers that must be of one width: by name, each with its choices in the same order."""

    names: tuple[str, ...]
    weights: int
    choices: tuple[tuple[Choice, ...], ...]  # one tuple per name

    @cached_property
    def totals(self) -> tuple[Choice, ...]:
        """The choices of all its layers together."""
        return tuple(
            Choice(
                together[0].option,
                *(sum(c.stored_bits for c in together), sum(c.adapter_bytes for c in together)),
                sum(c.nats for c in together),
            )
            for together in zip(*self.choices, strict=True)
        )


def tied(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Group the names of layers that serving engines fuse (FUSED), in order; the rest are alone."""
    groups: dict[tuple[str, int] | str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        kind = next((i for i, fused in enumerate(FUSED) if last in fused), None)
        groups.setdefault(name if kind is None else (parent, kind), []).append(name)
    return [tuple(group) for group in groups.values()]


def knapsack(
    items: Sequence[Item], stored_bits: float, adapter_bytes: int | None = None, *, gap: float = 0.0
) -> tuple[int, ...]:
    """Return for each item which of its choices to take, so that the predicted loss is the least and neither budget
    is exceeded: the multiple-choice knapsack problem, solved exactly (HiGHS through scipy.optimize.milp), or to a
    relative `gap`.

    Of an item's choices that lose the same the smaller one is taken; of equal solutions whichever the solver finds
    first, which is the same on every run. Raises RecipeError when a budget is too small.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    owner = np.repeat(np.arange(len(items)), [len(item.totals) for item in items])
    first = np.searchsorted(owner, np.arange(len(items)))
    nats, _ = _above_least([c.nats for item in items for c in item.totals], first, owner)
    size, least = _above_least([c.stored_bits for item in items for c in item.totals], first, owner)
    budgets: list[tuple[NDArray[np.float64], float]] = [(size, stored_bits * (1 + ROUNDING) - least)]
    if budgets[0][1] < 0:
        raise RecipeError(
            f"target_bits: the smallest widths take {least:.0f} bits, the budget is {stored_bits:.0f}; raise it"
        )
    if adapter_bytes is not None:
        adapter, least = _above_least([float(c.adapter_bytes) for item in items for c in item.totals], first, owner)
        budgets.append((adapter, adapter_bytes - least))
        if least > adapter_bytes:
            raise RecipeError(
                f"rank_budget: the smallest ranks take {least:.0f} bytes, the budget is {adapter_bytes}; raise it"
            )
    useful = np.concatenate([_undominated(item) for item in items])
    constraints = [
        LinearConstraint(
            coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), (len(items), len(owner))), 1, 1
        )
    ]
    for above, room in budgets:
        useful &= above <= room
        # Counted from the least that can be had, and in units of what is left, so that the solver's tolerance is small.
        shares = above * useful / (room or 1.0)
        constraints.append(LinearConstraint(shares[None], ub=1.0 if room else 0.0))
    for attempt in range(CUTS + 1):
        with _silenced():
            found = milp(
                OBJECTIVE * nats / max(float(nats.sum()), sys.float_info.min),
                constraints=constraints,
                integrality=np.ones(len(owner)),
                bounds=Bounds(0, useful.astype(np.float64)),
                # HiGHS 1.12's presolve saves no time here, and loses the best where sizes differ a millionfold.
                options={"mip_rel_gap": gap, "node_limit": NODES, "presolve": gap > 0},
            )
        if found.x is None:
            raise RecipeError(f"target_bits: no allocation was found under this budget ({found.message})")
        taken = found.x > 0.5
        picks = tuple(int(k) for k in np.flatnonzero(taken) - first)
        # The solver works to a tolerance; the budget is met all the same.
        if attempt == CUTS or not any(_over(_chosen(items, picks), stored_bits, adapter_bytes)):
            break
        constraints.append(LinearConstraint(taken[None].astype(np.float64), ub=len(items) - 1))  # all but these
    return _within(items, picks, stored_bits, adapter_bytes)


def _above_least(
    values: Sequence[float], first: NDArray[np.int64], owner: NDArray[np.int64]
) -> tuple[NDArray[np.float64], float]:
    """Return how far each choice's value is above the least one of its item, and the sum of these."""
    array = np.array(values, dtype=np.float64)
    least = np.minimum.reduceat(array, first)
    return array - least[owner], float(least.sum())


def _undominated(item: Item) -> NDArray[np.bool_]:
    """Whether no other of the item's choices is as good in everything, and better in something or an earlier one."""
    table = np.array([(c.nats, c.stored_bits, c.adapter_bytes) for c in item.totals])
    no_worse = (table[:, None] <= table[None]).all(-1)  # [i, j]: i is no worse than j
    alike = no_worse & no_worse.T
    earlier = np.tri(len(table), k=-1, dtype=np.bool_).T
    dominated: NDArray[np.bool_] = np.logical_or.reduce(no_worse & (~alike | earlier))
    return np.logical_not(dominated)


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep what compiled code prints off stdout: HiGHS 1.12 leaves lines of its own there, also without a log."""
    sys.stdout.flush()
    try:
        library: Any = ctypes.CDLL(None)
        saved = os.dup(1)
    except (OSError, TypeError):  # no such library, no such stdout
        yield
        return
    library.fflush(None)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(saved, 1)
        os.close(saved)


def _chosen(items: Sequence[Item], picks: Sequence[int]) -> list[Choice]:
    return [item.totals[pick] for item, pick in zip(items, picks, strict=True)]


def _over(chosen: Sequence[Choice], stored_bits: float, adapter_bytes: int | None) -> tuple[bool, bool]:
    """Whether these exceed the budget of bits, and that of the adapter."""
    too_large = adapter_bytes is not None and sum(c.adapter_bytes for c in chosen) > adapter_bytes
    return sum(c.stored_bits for c in chosen) > stored_bits * (1 + ROUNDING), too_large


def _within(
    items: Sequence[Item], picks: tuple[int, ...], stored_bits: float, adapter_bytes: int | None
) -> tuple[int, ...]:
    """Take the least harmful step down until both budgets hold to the last bit."""
    while True:
        chosen = _chosen(items, picks)
        over, too_large = _over(chosen, stored_bits, adapter_bytes)
        if not over and not too_large:
            return picks
        steps = [
            (other.nats - now.nats, i, k)
            for i, (item, now) in enumerate(zip(items, chosen, strict=True))
            for k, other in enumerate(item.totals)
            if other.stored_bits <= now.stored_bits and other.adapter_bytes <= now.adapter_bytes
            if (other.stored_bits < now.stored_bits if over else other.adapter_bytes < now.adapter_bytes)
        ]
        if not steps:
            raise RecipeError("target_bits: no allocation was found under this budget; raise it")
        _, index, pick = min(steps)
        picks = (*picks[:index], pick, *picks[index + 1 :])


def in_order(items: Sequence[Item], stored_bits: float, how: str, seed: int) -> tuple[int, ...]:
    """Return which choice each item takes by a rule that looks at no loss.

    All get the largest width that fits; the next one goes to the `first` layers, the `last`, `random` ones or evenly
    spread ones (`uniform`), as long as the budget holds. Raises RecipeError when the smallest width does not fit.
    """
    widths = sorted({choice.option.bits for item in items for choice in item.totals})
    sizes = {bits: sum(item.totals[_of_width(item, bits)].stored_bits for item in items) for bits in widths}
    fitting = [bits for bits in widths if sizes[bits] <= stored_bits * (1 + ROUNDING)]
    if not fitting:
        raise RecipeError(
            f"target_bits: {widths[0]} bits for all take {sizes[widths[0]]:.0f} bits, the budget is {stored_bits:.0f}"
        )
    low = fitting[-1]
    high = widths[min(widths.index(low) + 1, len(widths) - 1)]
    picks = [_of_width(item, low) for item in items]
    order = list(range(len(items)))
    if how == "last":
        order.reverse()
    elif how == "random":
        random.Random(seed).shuffle(order)
    left = stored_bits * (1 + ROUNDING) - sizes[low]
    whole = sum(item.weights for item in items)
    share = left / max(sizes[high] - sizes[low], 1e-9)  # of the weights that can be raised
    passed = raised = 0
    for index in order:
        item = items[index]
        cost = item.totals[_of_width(item, high)].stored_bits - item.totals[picks[index]].stored_bits
        passed += item.weights
        early = how == "uniform" and raised + item.weights / 2 > share * passed + 1e-9 * whole
        if cost <= left and not early:
            picks[index] = _of_width(item, high)
            left -= cost
            raised += item.weights
    return tuple(picks)


def _of_width(item: Item, bits: int) -> int:
    return next(k for k, choice in enumerate(item.totals) if choice.option.bits == bits)


def front(items: Sequence[Item], weights: int, adapter_bytes: int | None = None) -> list[tuple[float, float]]:
    """Return bits per weight and predicted loss (nats) of the best allocations between the smallest and the largest
    budget: the Pareto front, FRONT_POINTS of it at most, to FRONT_GAP or FRONT_GAP_OF_TWO."""
    low = sum(min(c.stored_bits for c in item.totals) for item in items)
    high = sum(max(c.stored_bits for c in item.totals) for item in items)
    gap = FRONT_GAP if adapter_bytes is None else FRONT_GAP_OF_TWO
    points = []
    for step in range(FRONT_POINTS):
        budget = low + (high - low) * step / (FRONT_POINTS - 1)
        picks = knapsack(items, budget, adapter_bytes, gap=gap)
        chosen = _chosen(items, picks)
        points.append((sum(c.stored_bits for c in chosen) / weights, sum(c.nats for c in chosen)))
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def picked(items: Sequence[Item], picks: Sequence[int]) -> Mapping[str, Choice]:
    """Return each layer's choice by its name."""
    return {
        name: choices[pick]
        for item, pick in zip(items, picks, strict=True)
        for name, choices in zip(item.names, item.choices, strict=True)
    }
