"""A plan held against what the stock loaders do with it, before the first weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qinit.errors import CheckpointError, TargetError
from qinit.formats import FORMATS
from qinit.plan.parts import Left, Whole
from qinit.plan.plan import Plan
from qinit.report.finish import base_config
from qinit.source.targets import LinearModule
from qinit.stock.settle import settle, whole_parameters
from qinit.stock.skeleton import Skeleton


def settled(plan: Plan) -> Plan:
    """Return a plan without those of its layers that the stock loaders do not repair as it has them: they are left
    alone. Raises TargetError where PEFT refuses the adapter, CheckpointError for a head that is not in the checkpoint.
    """
    found = settle(_skeleton(plan), plan.recipe, plan.adapter, plan.architecture, _ranks(plan))
    left = [layer for layer in plan.layers if layer.target.name in found.left]
    return replace(
        plan,
        layers=tuple(layer for layer in plan.layers if layer.target.name not in found.left),
        left=tuple(Left(layer.target, found.left[layer.target.name]) for layer in left),
        whole=_whole(plan, found.whole),
    )


def with_whole(plan: Plan) -> Plan:
    """Return a plan of settled layers with the parameters that PEFT trains whole."""
    found = whole_parameters(_skeleton(plan), plan.recipe, plan.adapter, plan.architecture, _ranks(plan))
    return replace(plan, whole=_whole(plan, found))


def _skeleton(plan: Plan) -> Skeleton:
    return Skeleton.of(plan.checkpoint, plan.recipe.trust_remote_code)


def _ranks(plan: Plan) -> list[tuple[LinearModule, int]]:
    return [(layer.target.module, layer.rank) for layer in plan.layers]


def _whole(plan: Plan, parameters: Mapping[str, str]) -> tuple[Whole, ...]:
    checkpoint = plan.checkpoint
    names = plan.architecture.names_in(checkpoint)
    found = []
    for name, parameter in parameters.items():
        tensor = names.find(parameter)
        if tensor is None:
            raise CheckpointError(
                f"{checkpoint.directory}: has no '{parameter}', a part of the head of {plan.architecture.class_name} "
                "that PEFT trains whole and expects in the adapter's file; train the head first, or take the class out "
                "of architectures in config.json"
            )
        found.append(Whole(name, tensor))
    return tuple(found)


def require_packed(plan: Plan) -> None:
    """Raise TargetError where the base's loader would pack other modules than the plan does."""
    config = base_config(plan)
    if "quantization_config" not in config:
        return
    packed = FORMATS[plan.recipe.format].replaced(config, plan.architecture)
    wrong = set() if packed is None else packed ^ {layer.target.name for layer in plan.quantized}
    if wrong:
        raise TargetError(
            f"format {plan.recipe.format}: its loader would pack other modules than were chosen ({sorted(wrong)[0]}); "
            "choose others with --target-modules, or use --format dense"
        )
