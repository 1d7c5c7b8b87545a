"""Mixed widths: a plan whose layers get different bits, groups and ranks, under a budget (MEQFT)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qinit.errors import RecipeError
from qinit.files.tensors import TensorSpec
from qinit.files.writer import headers_bytes
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.plan.allocation import Allocation, Nats, Option, Sensitivity
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan, with_option
from qinit.widths.knapsack import Choice, Item, front, in_order, knapsack, picked, tied
from qinit.widths.prices import prices
from qinit.widths.validity import check_sensitivity
from qinit.words import parse_size

RANK_FACTORS = (0.25, 0.5, 1, 2, 4)  # of the recipe's rank, where ranks are chosen
GROUP_FACTORS = (0.5, 1, 2)  # of the recipe's group size, where one budget is for base and adapter


def options(plan: Plan) -> dict[str, list[Option]]:
    """Return what each quantized layer may get; the same number for all."""
    return {
        layer.target.name: [
            Option(bits, group_size, rank)
            for bits in plan.recipe.widths
            for group_size in _group_sizes(plan, layer)
            for rank in _ranks(plan, layer)
        ]
        for layer in plan.quantized
    }


def _group_sizes(plan: Plan, layer: LayerPlan) -> list[int]:
    """Return the sizes to choose from; the layer's own in the place of what its format cannot hold."""
    if not plan.recipe.joint:
        return [layer.group_size]
    recipe, module, fmt = plan.recipe, layer.target.module, FORMATS[plan.recipe.format]
    sizes = []
    for factor in GROUP_FACTORS:
        size = min(int(recipe.group_size * factor), module.in_features)
        refused = fmt.cannot_hold(recipe.row.grid, recipe.widths[0], size) or fmt.cannot_hold_shape(module, size)
        sizes.append(layer.group_size if refused else size)
    return sizes


def _ranks(plan: Plan, layer: LayerPlan) -> list[int]:
    rank, module = plan.recipe.rank, layer.target.module
    if not plan.recipe.chooses_ranks:
        return [layer.rank]
    if layer.target.module.expert is not None:  # PEFT gives one rank to all experts of a parameter
        return [layer.rank] * len(RANK_FACTORS)
    return [min(max(1, int(rank * factor)), module.out_features, module.in_features) for factor in RANK_FACTORS]


def items(plan: Plan, nats: Nats | None) -> list[Item]:
    """Return what the knapsack chooses from; fused layers are one item where the recipe ties them."""
    layers = {layer.target.name: layer for layer in plan.quantized}
    own = options(plan)
    groups = tied(list(layers)) if plan.recipe.tie == "fused" else [(name,) for name in layers]
    return [
        Item(
            group,
            sum(layers[name].weights for name in group),
            tuple(
                tuple(_choice(plan, layers[name], option, nats[name][option] if nats else 0.0) for option in own[name])
                for name in group
            ),
        )
        for group in groups
    ]


def _choice(plan: Plan, layer: LayerPlan, option: Option, nats: float) -> Choice:
    """Sizes as stored; a layer that is stored dense counts as its grid would, packed."""
    grid_bits = layer.weights * GRIDS[plan.recipe.row.grid].bits_per_weight(option.bits, option.group_size)
    if not FORMATS[plan.recipe.format].storage(layer.target):
        grid_bits = 8.0 * with_option(plan, layer, option).bytes_after
    factors = sum(spec.nbytes for spec in plan.adapter.specs(layer.target.module, option.rank))
    return Choice(option, grid_bits + (8 * factors if plan.recipe.joint else 0), factors, nats)


def budget(plan: Plan, choices: list[Item]) -> float:
    """Return the bits that the quantized weights may take, where one budget is for both with their adapters. Raises
    RecipeError for a target that nothing reaches."""
    recipe = plan.recipe
    low = sum(min(c.stored_bits for c in item.totals) for item in choices)
    high = sum(max(c.stored_bits for c in item.totals) for item in choices)
    if recipe.ratio is not None:
        return low + recipe.ratio * (high - low)
    if recipe.target_size is not None:
        return _left_of_size(plan, choices, recipe.target_size, low, high)
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
                f"{', '.join(map(str, recipe.widths))} and their scales and zero points"
                f"{' and the adapter' if recipe.joint else ''} the {word} is {bound:.4f}"
            )
    return min(max(wanted, low), high)


def _left_of_size(plan: Plan, choices: list[Item], size: str, low: float, high: float) -> float:
    """Return the bits that a size of the weight files leaves for the quantized layers and their adapters."""
    others = plan.base_bytes - sum(layer.bytes_after for layer in plan.quantized)
    others += sum(spec.nbytes for layer in plan.layers if layer.kept for spec in _adapter_specs(plan, layer))
    others += _headers(plan, choices)
    wanted = 8.0 * (parse_size(size) - others)
    if wanted < low:
        least = math.ceil((low / 8 + others) / 1000)
        raise RecipeError(
            f"target_size: {size} cannot be had; what is not quantized, headers too, takes {others / 1e6:.2f} MB, and "
            f"with the smallest widths and ranks and the largest groups the least is {least}KB"
        )
    return min(wanted, high)


def _headers(plan: Plan, choices: list[Item]) -> int:
    """Return at most what the files' headers take, whatever is chosen: those of the largest shapes and places."""
    largest = _with(plan, choices, tuple(_end(item, max) for item in choices))
    return headers_bytes(largest.base_specs, plan.max_shard_bytes) + headers_bytes(largest.adapter_specs)


def _adapter_specs(plan: Plan, layer: LayerPlan) -> list[TensorSpec]:
    return plan.adapter.specs(layer.target.module, layer.rank)


def adapter_budget(plan: Plan, choices: list[Item]) -> int | None:
    """Return the bytes that the quantized layers' adapters may take: what is left of the rank budget by those of the
    layers that are kept. Raises RecipeError when that is too little for the smallest ranks."""
    if plan.recipe.rank_budget is None:
        return None
    left = [layer for layer in plan.layers if layer.kept]
    kept = sum(spec.nbytes for layer in left for spec in _adapter_specs(plan, layer))
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
    if recipe.joint:
        return _with(plan, choices, tuple(_end(item, min) for item in choices))
    middle = _plain(plan, choices)
    plan = _with(plan, middle, in_order(middle, bits, how, recipe.seed))
    if recipe.allocation != "sensitivity":
        plan = replace(plan, allocation=Allocation(how, "by a rule; nothing was measured"))
    return plan


def allotted(plan: Plan, sensitivity: Sensitivity) -> Plan:
    """Give every layer the width, and where they are chosen too the groups and the rank, that lose least under the
    budget."""
    choices = items(plan, sensitivity.nats)
    bits = budget(plan, choices)
    adapters = adapter_budget(plan, choices)
    weights = sum(layer.weights for layer in plan.quantized)
    picks = knapsack(choices, bits, adapters)
    chosen = [item.totals[pick] for item, pick in zip(choices, picks, strict=True)]
    plain = _plain(plan, choices)
    uniform = []
    for width in plan.recipe.widths:
        alike = [next(c for c in item.totals if c.option.bits == width) for item in plain]
        uniform.append((sum(c.stored_bits for c in alike) / weights, sum(c.nats for c in alike)))
    allocation = Allocation(
        "sensitivity",
        sensitivity.how,
        front=tuple(front(choices, weights, adapters)),
        chosen=(sum(c.stored_bits for c in chosen) / weights, sum(c.nats for c in chosen)),
        uniform=tuple(uniform),
        sensitivity=sensitivity,
        prices=prices(choices, picks) if plan.recipe.joint else {},
    )
    return replace(_with(plan, choices, picks), allocation=allocation)


def _plain(plan: Plan, choices: list[Item]) -> list[Item]:
    """Return the items with the recipe's own rank and group size only."""
    if plan.recipe.chooses_ranks:
        middle = RANK_FACTORS.index(1)
        choices = [_every(item, middle, len(RANK_FACTORS)) for item in choices]
    if plan.recipe.joint:
        middle = GROUP_FACTORS.index(1)
        choices = [_every(item, middle, len(GROUP_FACTORS)) for item in choices]
    return choices


def _every(item: Item, first: int, step: int) -> Item:
    return replace(item, choices=tuple(own[first::step] for own in item.choices))


def _end(item: Item, end: Callable[..., int]) -> int:
    """Return the number of the choice that takes least or most room."""
    return end(range(len(item.totals)), key=lambda k: item.totals[k].stored_bits)


def _with(plan: Plan, choices: list[Item], picks: tuple[int, ...]) -> Plan:
    found = picked(choices, picks)
    layers = tuple(
        layer if layer.kept else with_option(plan, layer, found[layer.target.name].option) for layer in plan.layers
    )
    return replace(plan, layers=layers)
