"""From a recipe and a checkpoint to a plan; reads headers and configuration only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qinit.adapters import ADAPTERS
from qinit.errors import RecipeError, TargetError
from qinit.files.tensors import TensorSpec
from qinit.formats import FORMATS
from qinit.machine import pick_device
from qinit.plan.plan import LayerPlan, Plan
from qinit.planner.auto import choose
from qinit.planner.polish import choose_polish
from qinit.recipe import Recipe
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import Architecture, Target, quantizable, read_architecture, select
from qinit.text.sources import check_source
from qinit.widths.budget import planned


def make_plan(recipe: Recipe, directory: Path, model_name: str) -> Plan:
    """Open the checkpoint, choose its layers and lay out the output; reads headers and configuration only.

    Raises CheckpointError and TargetError.
    """
    checkpoint = Checkpoint.open(directory)
    architecture = read_architecture(checkpoint, recipe.trust_remote_code)
    targets = select(quantizable(checkpoint, architecture), recipe.target_modules, recipe.exclude)
    held = [target for target in targets if target.module.expert is None or FORMATS[recipe.format].holds_experts]
    adapted = _adapted(held, architecture) if ADAPTERS[recipe.row.adapter].experts else set()
    layers = tuple(_plan_layer(recipe, target, adapted) for target in held)
    plan = Plan(recipe, model_name, checkpoint, architecture, layers)
    if not plan.quantized:
        raise TargetError(
            f"format {recipe.format} can hold none of the {len(layers)} chosen layers "
            f"({plan.notes[0]}); use --format dense"
        )
    if not any(layer.rank for layer in layers):
        raise TargetError(
            f"none of the chosen layers gets an adapter ({plan.notes[-1]}); choose more with --target-modules"
        )
    plan = _with_polish(_with_calibration(plan))
    if recipe.mixed:
        plan = planned(plan)
    return plan


def _with_calibration(plan: Plan) -> Plan:
    """Decide `auto`, and check what was asked for before anything expensive happens."""
    recipe, checkpoint = plan.recipe, plan.checkpoint
    if recipe.calibration == "auto":
        choice = choose(plan, pick_device(recipe.device))
        asked = {key: getattr(recipe, key) for key in ("rounding", "act_order", "polish") if getattr(recipe, key)}
        if choice.source == "none" and asked:
            raise RecipeError(f"{', '.join(asked)}: needs calibration, and there is none: {choice.reason}")
        chosen: dict[str, str | int] = {"calibration": choice.source}
        if choice.samples is not None:
            chosen["calibration_samples"] = choice.samples
        recipe = recipe.model_copy(update=chosen)
        plan = replace(plan, recipe=recipe, calibration_reason=choice.reason)
    if recipe.calibrated:
        check_source(
            recipe.calibration,
            checkpoint.directory,
            checkpoint.config,
            recipe.text_field,
            trust_remote_code=recipe.trust_remote_code,
        )
    if recipe.row.needs and not recipe.calibrated:
        raise RecipeError(f"calibration: method {recipe.method} needs it; give --calibration self, text or a text file")
    return plan


def _with_polish(plan: Plan) -> Plan:
    """Decide how many steps of polish there are, where that is open."""
    if plan.recipe.polish and not plan.polishable:
        raise RecipeError("polish: trains linear layers, and only experts are chosen; choose others too")
    if plan.recipe.polish is not None:
        return plan
    steps, reason = choose_polish(plan, pick_device(plan.recipe.device))
    return replace(plan, recipe=plan.recipe.model_copy(update={"polish": steps}), polish_reason=reason)


def _adapted(targets: Sequence[Target], architecture: Architecture) -> set[str]:
    """Return the experts that get adapters: PEFT adapts a 3-D parameter as a whole, and what it calls the factors
    depends on how many of its module's are adapted."""
    chosen = {target.name for target in targets}
    stacks: dict[str, set[str]] = {}
    for stack in architecture.stacks:
        if stack.sources:
            stacks.setdefault(stack.module, set()).update(stack.slice_names())
    return {name for names in stacks.values() if names <= chosen for name in names}


def _plan_layer(recipe: Recipe, target: Target, experts: set[str]) -> LayerPlan:
    """Plan a layer; `experts` are those that get adapters."""
    module, fmt = target.module, FORMATS[recipe.format]
    adapted = module.expert is None or module.name in experts
    kept = fmt.cannot_hold_shape(module, recipe.group_size)
    rank = min(recipe.rank, module.out_features, module.in_features) if adapted else 0
    group_size = min(recipe.group_size, module.in_features)
    same = TensorSpec(target.tensor.name, target.tensor.dtype, target.tensor.shape)
    bits = recipe.widths[0]
    specs = (same,) if kept else tuple(fmt.specs(target, bits, group_size))
    return LayerPlan(target, bits, group_size, rank, kept, specs)
