"""Mixed widths: a plan whose layers get different bits, and ranks, under a budget (MEQFT)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from qinit.errors import RecipeError
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.plan.allocation import Allocation, Nats, Sensitivity
from qinit.plan.plan import LayerPlan, Plan, with_choice
from qinit.recipe import parse_size
from qinit.widths.knapsack import Choice, Item, front, in_order, knapsack, picked, tied
from qinit.widths.validity import check_sensitivity

RANK_FACTORS = (0.25, 0.5, 1, 2, 4)  # of the recipe's rank, with a rank budget


def options(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    """Return the (bits, rank) that each quantized layer may get; the same number for all."""
    return {
        layer.target.name: [(bits, rank) for bits in plan.recipe.widths for rank in _ranks(plan, layer)]
        for layer in plan.quantized
    }


def _ranks(plan: Plan, layer: LayerPlan) -> list[int]:
    rank, module = plan.recipe.rank, layer.target.module
    if plan.recipe.rank_budget is None:
        return [layer.rank]
    if layer.target.module.expert is not None:  # PEFT gives one rank to all experts of a parameter
        return [layer.rank] * len(RANK_FACTORS)
    return [min(max(1, int(rank * factor)), module.out_features, module.in_features) for factor in RANK_FACTORS]


def items(plan: Plan, nats: Nats | None) -> list[Item]:
    """Return what the knapsack chooses from; fused layers are one item where the recipe ties them."""
    layers = {layer.target.name: layer for layer in plan.quantized}
    pairs = options(plan)
    groups = tied(list(layers)) if plan.recipe.tie == "fused" else [(name,) for name in layers]
    return [
        Item(
            group,
            sum(layers[name].weights for name in group),
            tuple(
                tuple(_choice(plan, layers[name], *pair, nats[name][pair] if nats else 0.0) for pair in pairs[name])
                for name in group
            ),
        )
        for group in groups
    ]


def _choice(plan: Plan, layer: LayerPlan, bits: int, rank: int, nats: float) -> Choice:
    """Sizes as stored; a layer that is stored dense counts as its grid would, packed."""
    grid_bits = layer.weights * GRIDS[plan.recipe.row.grid].bits_per_weight(bits, layer.group_size)
    if not FORMATS[plan.recipe.format].storage(layer.target):
        grid_bits = 8.0 * with_choice(plan, layer, bits, rank).bytes_after
    factors = sum(spec.nbytes for spec in plan.adapter.specs(layer.target.module, rank))
    return Choice(bits, rank, grid_bits, factors, nats)


def budget(plan: Plan, choices: list[Item]) -> float:
    """Return the bits that the quantized weights may take. Raises RecipeError for a target that no widths reach."""
    recipe = plan.recipe
    low = sum(min(c.stored_bits for c in item.totals) for item in choices)
    high = sum(max(c.stored_bits for c in item.totals) for item in choices)
    if recipe.ratio is not None:
        return low + recipe.ratio * (high - low)
    assert recipe.target_bits is not None
    weights = sum(layer.weights for layer in plan.quantized)
    wanted = recipe.target_bits * weights
    least, most = math.ceil(low / weights * 1e4 - 1e-6) / 1e4, math.floor(high / weights * 1e4 + 1e-6) / 1e4
    for word, bound, missed in (
        ("least", least, wanted < low * (1 - 1e-9)),
        ("most", most, wanted > high * (1 + 1e-9)),
    ):
        if missed:
            raise RecipeError(
                f"target_bits: {recipe.target_bits:g} bits per weight cannot be had; with widths "
                f"{', '.join(map(str, recipe.widths))} and their scales and zero points the {word} is {bound:.4f}"
            )
    return min(max(wanted, low), high)


def adapter_budget(plan: Plan, choices: list[Item]) -> int | None:
    """Return the bytes that the quantized layers' adapters may take: what is left of the rank budget by those of the
    layers that are kept. Raises RecipeError when that is too little for the smallest ranks."""
    if plan.recipe.rank_budget is None:
        return None
    left = [layer for layer in plan.layers if layer.kept]
    kept = sum(spec.nbytes for layer in left for spec in plan.adapter.specs(layer.target.module, layer.rank))
    least = kept + sum(min(c.adapter_bytes for c in item.totals) for item in choices)
    whole = parse_size(plan.recipe.rank_budget)
    if least > whole:
        raise RecipeError(
            f"rank_budget: {plan.recipe.rank_budget} are too few; with the smallest ranks, from "
            f"{max(1, int(plan.recipe.rank * RANK_FACTORS[0]))}, the adapter takes {least} bytes"
        )
    return whole - kept


def planned(plan: Plan) -> Plan:
    """Give every layer its width as far as it can be known before measuring: by a rule, or from a sensitivity file.
    Otherwise the widths are provisional and the plan is pending. Raises RecipeError."""
    recipe = plan.recipe
    if recipe.sensitivity is not None:
        file = Path(recipe.sensitivity)
        sensitivity = Sensitivity.read(file)
        check_sensitivity(sensitivity, plan, options(plan), file)
        return allotted(plan, sensitivity)
    choices = items(plan, None)
    bits = budget(plan, choices)
    adapter_budget(plan, choices)
    how = "uniform" if recipe.allocation == "sensitivity" else recipe.allocation
    middle = _at_recipe_rank(plan, choices)
    plan = _with(plan, middle, in_order(middle, bits, how, recipe.seed))
    if recipe.allocation != "sensitivity":
        plan = replace(plan, allocation=Allocation(how, "by a rule; nothing was measured"))
    return plan


def allotted(plan: Plan, sensitivity: Sensitivity) -> Plan:
    """Give every layer the width, and with a rank budget the rank, that lose least under the budget."""
    choices = items(plan, sensitivity.nats)
    bits = budget(plan, choices)
    adapters = adapter_budget(plan, choices)
    weights = sum(layer.weights for layer in plan.quantized)
    picks = knapsack(choices, bits, adapters)
    chosen = [item.totals[pick] for item, pick in zip(choices, picks, strict=True)]
    plain = _at_recipe_rank(plan, choices)
    uniform = []
    for width in plan.recipe.widths:
        alike = [next(c for c in item.totals if c.bits == width) for item in plain]
        uniform.append((sum(c.stored_bits for c in alike) / weights, sum(c.nats for c in alike)))
    allocation = Allocation(
        "sensitivity",
        sensitivity.how,
        front=tuple(front(choices, weights, adapters)),
        chosen=(sum(c.stored_bits for c in chosen) / weights, sum(c.nats for c in chosen)),
        uniform=tuple(uniform),
        sensitivity=sensitivity,
    )
    return replace(_with(plan, choices, picks), allocation=allocation)


def _at_recipe_rank(plan: Plan, choices: list[Item]) -> list[Item]:
    """Return the items with the recipe's own rank only."""
    if plan.recipe.rank_budget is None:
        return choices
    middle = RANK_FACTORS.index(1)
    return [replace(item, choices=tuple(own[middle :: len(RANK_FACTORS)] for own in item.choices)) for item in choices]


def _with(plan: Plan, choices: list[Item], picks: tuple[int, ...]) -> Plan:
    found = picked(choices, picks)
    layers = tuple(
        with_choice(plan, layer, found[layer.target.name].bits, found[layer.target.name].rank)
        if layer.kept is None
        else layer
        for layer in plan.layers
    )
    return replace(plan, layers=layers)
