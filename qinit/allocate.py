"""Which width, and which rank, each layer gets under a budget."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qinit.errors import RecipeError

# What serving engines fuse into one matrix, so that it must have one width.
FUSED = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value")),
    *(("q", "k", "v"), ("wi_0", "wi_1"), ("q_lin", "k_lin", "v_lin")),
)
FRONT_POINTS = 17


@dataclass(frozen=True)
class Choice:
    """What a layer may get: its stored size in bits, its adapter's in bytes, and the loss in nats per token that it is
    predicted to add (0 where nothing was measured)."""

    bits: int
    rank: int
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
                *(together[0].bits, together[0].rank),
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


def knapsack(items: Sequence[Item], stored_bits: float, adapter_bytes: int | None = None) -> tuple[int, ...]:
    """Return for each item which of its choices to take, so that the predicted loss is the least and neither budget
    is exceeded: the multiple-choice knapsack problem, solved exactly (HiGHS through scipy.optimize.milp).

    Of equal solutions the one with fewer stored bits is taken, then the one with the smaller adapter, then whichever
    the solver finds first, which is the same on every run. Raises RecipeError when the budget is too small.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    owner = np.repeat(np.arange(len(items)), [len(item.totals) for item in items])
    choices = [choice for item in items for choice in item.totals]
    nats = np.array([choice.nats for choice in choices])
    size = np.array([choice.stored_bits for choice in choices])
    adapter = np.array([float(choice.adapter_bytes) for choice in choices])
    least = sum(min(c.stored_bits for c in item.totals) for item in items)
    if least > stored_bits * (1 + 1e-12):
        raise RecipeError(
            f"target_bits: the smallest widths take {least:.0f} bits, the budget is {stored_bits:.0f}; raise it"
        )
    scale = max(float(np.abs(nats).sum()), np.finfo(np.float64).tiny)
    objective = nats / scale + 1e-9 * size / size.sum() + 1e-10 * adapter / max(float(adapter.sum()), 1.0)
    one_each = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(items), len(owner)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint((size / stored_bits)[None], ub=1.0)]
    if adapter_bytes is not None:
        smallest = sum(min(c.adapter_bytes for c in item.totals) for item in items)
        if smallest > adapter_bytes:
            raise RecipeError(
                f"rank_budget: the smallest ranks take {smallest} bytes, the budget is {adapter_bytes}; raise it"
            )
        constraints.append(LinearConstraint((adapter / adapter_bytes)[None], ub=1.0))
    found = milp(
        *(objective,),
        constraints=constraints,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": 60.0},
    )
    if found.x is None:
        raise RecipeError(f"target_bits: no allocation was found under this budget ({found.message})")
    taken = np.flatnonzero(found.x > 0.5)
    first = np.searchsorted(owner, np.arange(len(items)))
    picks = tuple(int(index - first[owner[index]]) for index in taken)
    # The solver works to a tolerance; the budget is met all the same.
    return _within(items, picks, stored_bits, adapter_bytes)


def _within(
    items: Sequence[Item], picks: tuple[int, ...], stored_bits: float, adapter_bytes: int | None
) -> tuple[int, ...]:
    """Take the least harmful step down until both budgets hold to the last bit."""
    while True:
        chosen = [item.totals[pick] for item, pick in zip(items, picks, strict=True)]
        over = sum(c.stored_bits for c in chosen) > stored_bits * (1 + 1e-12)
        too_large = adapter_bytes is not None and sum(c.adapter_bytes for c in chosen) > adapter_bytes
        if not over and not too_large:
            return picks
        steps = [
            (other.nats - now.nats, i, k)
            for i, (item, now) in enumerate(zip(items, chosen, strict=True))
            for k, other in enumerate(item.totals)
            if (other.stored_bits < now.stored_bits if over else other.adapter_bytes < now.adapter_bytes)
        ]
        _, index, pick = min(steps)
        picks = (*picks[:index], pick, *picks[index + 1 :])


def in_order(items: Sequence[Item], stored_bits: float, how: str, seed: int) -> tuple[int, ...]:
    """Return which choice each item takes by a rule that looks at no loss.

    All get the largest width that fits; the next one goes to the `first` layers, the `last`, `random` ones or evenly
    spread ones (`uniform`), as long as the budget holds. Raises RecipeError when the smallest width does not fit.
    """
    widths = sorted({choice.bits for item in items for choice in item.totals})
    sizes = {bits: sum(item.totals[_of_width(item, bits)].stored_bits for item in items) for bits in widths}
    fitting = [bits for bits in widths if sizes[bits] <= stored_bits * (1 + 1e-12)]
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
    left = stored_bits * (1 + 1e-12) - sizes[low]
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
    return next(k for k, choice in enumerate(item.totals) if choice.bits == bits)


def front(items: Sequence[Item], weights: int, adapter_bytes: int | None = None) -> list[tuple[float, float]]:
    """Return bits per weight and predicted loss (nats) of the best allocations between the smallest and the largest
    budget: the Pareto front, FRONT_POINTS of it at most."""
    low = sum(min(c.stored_bits for c in item.totals) for item in items)
    high = sum(max(c.stored_bits for c in item.totals) for item in items)
    points: dict[float, float] = {}
    for step in range(FRONT_POINTS):
        budget = low + (high - low) * step / (FRONT_POINTS - 1)
        chosen = [item.totals[k] for item, k in zip(items, knapsack(items, budget, adapter_bytes), strict=True)]
        points[sum(c.stored_bits for c in chosen) / weights] = sum(c.nats for c in chosen)
    return sorted(points.items())


def picked(items: Sequence[Item], picks: Sequence[int]) -> Mapping[str, Choice]:
    """Return each layer's choice by its name."""
    return {
        name: choices[pick]
        for item, pick in zip(items, picks, strict=True)
        for name, choices in zip(item.names, item.choices, strict=True)
    }
