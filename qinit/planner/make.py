"""From a recipe and a checkpoint to a plan; reads headers and configuration only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qinit.adapters import ADAPTERS
from qinit.errors import RecipeError, TargetError
from qinit.files.tensors import TensorSpec
from qinit.formats import FORMATS, DenseFormat
from qinit.machine import Card
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.planner.auto import choose
from qinit.planner.given import given_layers, given_remarks, open_given, open_source, require_rank
from qinit.planner.left import left_alone
from qinit.planner.polish import brings_text, choose_polish
from qinit.planner.settled import require_packed, settled
from qinit.recipe import Recipe
from qinit.solver.methods import STARTS
from qinit.source.names import Names
from qinit.source.targets import Architecture, Target, quantizable, select
from qinit.text.sources import check_source
from qinit.widths.budget import planned


def make_plan(
    recipe: Recipe, directory: Path, model_name: str, base: Path | None = None, card: Card | None = None
) -> Plan:
    """Open the checkpoint, choose its layers and lay out the output; reads headers and configuration only. `base` is
    where the base lies that the recipe names, if it names one, and `card` what to plan for, if that is not here.

    Raises CheckpointError and TargetError.
    """
    checkpoint, architecture = open_source(recipe, directory, base)
    known = quantizable(checkpoint, architecture)
    targets = select(known, recipe.target_modules, recipe.exclude, architecture.in_language)
    names = architecture.names_in(checkpoint)
    plan = Plan(recipe, model_name, checkpoint, architecture, (), card=card)
    reason = FORMATS[recipe.format].cannot_load(architecture)
    if reason is not None:
        plan = replace(plan, recipe=recipe.model_copy(update={"format": DenseFormat.name}), format_reason=reason)
    holds_experts = FORMATS[plan.recipe.format].holds_experts
    held = [target for target in targets if target.module.expert is None or holds_experts]
    if recipe.method in STARTS:
        require_rank(recipe, held)
    if base is not None:
        plan = replace(plan, given=open_given(recipe, base, directory, architecture))
        layers = given_layers(plan, known, tuple(target for target in targets if target.module.expert is None))
    else:
        experts = _adapted(held, architecture) if ADAPTERS[recipe.adapter].experts else set()
        layers = tuple(_plan_layer(plan.recipe, target, names, experts) for target in held)
    remarks = [*left_alone(architecture, names, known, targets)]
    remarks += [] if plan.given is None else given_remarks(plan.given)
    plan = settled(replace(plan, layers=layers, remarks=tuple(remarks)))
    if not plan.quantized:
        raise _nothing_left(plan, len(layers))
    if not any(layer.rank for layer in plan.layers):
        raise TargetError(
            f"none of the chosen layers gets an adapter ({plan.notes[-1]}); choose more with --target-modules"
        )
    if plan.given is None:
        require_packed(plan)
    plan = _with_polish(_with_calibration(plan))
    if recipe.mixed:
        plan = planned(plan)
    return plan


def _nothing_left(plan: Plan, chosen: int) -> TargetError:
    reasons = "; ".join(plan.exceptions)
    if not plan.layers:
        return TargetError(f"none of the {chosen} chosen layers can be repaired ({reasons}); choose others")
    return TargetError(
        f"format {plan.recipe.format} can hold none of the {chosen} chosen layers ({reasons}); use --format dense"
    )


def _with_calibration(plan: Plan) -> Plan:
    """Decide `auto`, and check what was asked for before anything expensive happens."""
    recipe, checkpoint = plan.recipe, plan.checkpoint
    auto = recipe.calibration == "auto"
    if auto:
        choice = choose(plan, plan.device)
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
            tokenized=auto,  # `choose` takes no text that needs one before it has tried it
        )
    if "gradient" in recipe.row.needs and not plan.facts.causal:
        raise RecipeError(f"method: {recipe.method} takes the loss of the next token, and this model predicts none")
    if recipe.row.needs and not recipe.calibrated:
        raise RecipeError(f"calibration: method {recipe.method} needs it; give --calibration self, text or a text file")
    return plan


def _with_polish(plan: Plan) -> Plan:
    """Decide how many steps of polish there are, where that is open, and on which text."""
    if plan.recipe.polish and not plan.polishable:
        raise RecipeError("polish: trains linear layers, and only experts are chosen; choose others too")
    if plan.recipe.polish is None:
        steps, reason = choose_polish(plan, plan.device)
        plan = replace(plan, recipe=plan.recipe.model_copy(update={"polish": steps}), polish_reason=reason)
    return replace(plan, polish_brought=bool(plan.recipe.polish) and brings_text(plan))


def _adapted(targets: Sequence[Target], architecture: Architecture) -> set[str]:
    """Return the experts that get adapters: PEFT adapts a 3-D parameter as a whole, and what it calls the factors
    depends on how many of its module's are adapted."""
    chosen = {target.name for target in targets}
    stacks: dict[str, set[str]] = {}
    for stack in architecture.stacks:
        if stack.sources:
            stacks.setdefault(stack.module, set()).update(stack.slice_names())
    return {name for names in stacks.values() if names <= chosen for name in names}


def _plan_layer(recipe: Recipe, target: Target, names: Names, experts: set[str]) -> LayerPlan:
    """Plan a layer; `experts` are those that get adapters."""
    module, fmt = target.module, FORMATS[recipe.format]
    adapted = module.expert is None or module.name in experts
    kept = fmt.cannot_hold_shape(module, recipe.group_size)
    if module.expert is None and not all(names.arrives(target.prefix + p, f"{module.name}.{p}") for p in fmt.parts):
        kept = (
            kept
            or f"transformers renames {target.tensor.name} as it loads it, but not the packed tensors of {fmt.name}"
        )
    rank = min(recipe.rank, module.out_features, module.in_features) if adapted else 0
    group_size = min(recipe.group_size, module.in_features)
    same = TensorSpec(target.tensor.name, target.tensor.dtype, target.tensor.shape)
    bits = recipe.widths[0]
    specs = (same,) if kept else tuple(fmt.specs(target, bits, group_size))
    return LayerPlan(target, bits, group_size, rank, kept, specs)
