"""Which layers the stock loaders adapt as a plan has them, which have to be left alone, and what PEFT trains whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qinit.adapters.base import Adapter
from qinit.errors import TargetError
from qinit.recipe import Recipe
from qinit.source.targets import Architecture, LinearModule
from qinit.stock.adapting import Adapted, Refused, adapt
from qinit.stock.inputs import possible_inputs
from qinit.stock.read_directly import read_directly
from qinit.stock.skeleton import Skeleton

ODD = "class {subclass} does more than W x + b"
READ = "the model reads the weight directly, so that an adapter would have no effect"
HEAD = "trained whole by PEFT, as a part of the head"
MOVED = "PEFT would put the adapter on the experts instead (peft issue 3711)"
OTHER = "PEFT would put no adapter there"
Ranks = Sequence[tuple[LinearModule, int]]


@dataclass(frozen=True)
class Settled:
    """Reasons by the names of the modules that are left alone, and the parameters that the adapter's file holds whole:
    their names in the model, by their names in the file."""

    left: Mapping[str, str]
    whole: Mapping[str, str]


def settle(skeleton: Skeleton, recipe: Recipe, adapter: Adapter, architecture: Architecture, ranks: Ranks) -> Settled:
    """Find out which of the modules stock transformers and PEFT repair, trying it on the skeleton.

    Raises TargetError where PEFT refuses the adapter whatever is left out.
    """
    direct = _read_directly(skeleton, tuple(module.name for module in architecture.linear))
    left = {module.name: ODD.format(subclass=module.subclass) for module, _ in ranks if not module.plain}
    left |= {module.name: READ for module, _ in ranks if module.name in direct}
    whole: Mapping[str, str] = {}
    while rest := [(module, rank) for module, rank in ranks if module.name not in left]:
        try:
            found = _adapted(skeleton, recipe, adapter, architecture, rest)
        except Refused as refusal:
            left |= _refused(skeleton, recipe, adapter, architecture, rest, refusal)
            continue
        wrong = _wrong(adapter, rest, found)
        if not wrong:
            whole = found.whole
            _require_no_more(adapter, rest, found)
            break
        left |= dict.fromkeys(wrong, MOVED if found.on_parameters else OTHER)
    heads = set(whole.values())
    left |= {name: HEAD for name in left if f"{name}.weight" in heads}
    return Settled(left, whole)


def whole_parameters(
    skeleton: Skeleton, recipe: Recipe, adapter: Adapter, architecture: Architecture, ranks: Ranks
) -> Mapping[str, str]:
    """Return `Settled.whole` for modules that are settled; nothing where PEFT refuses them."""
    try:
        return _adapted(skeleton, recipe, adapter, architecture, ranks).whole
    except Refused:
        return {}


@lru_cache(maxsize=128)
def _read_directly(skeleton: Skeleton, names: tuple[str, ...]) -> set[str]:
    model = skeleton.build()
    linear = {name: model.get_submodule(name) for name in names}
    trials = list(possible_inputs(model, skeleton.checkpoint.directory))
    return read_directly(model, linear, trials, lambda: skeleton.build(include_buffers=False))


def _adapted(skeleton: Skeleton, recipe: Recipe, adapter: Adapter, architecture: Architecture, ranks: Ranks) -> Adapted:
    config = adapter.config(recipe, architecture, ranks, "")
    shapes = {spec.name: spec.shape for spec in adapter.file_specs(ranks)}
    return adapt(skeleton, config, shapes)


def _wrong(adapter: Adapter, ranks: Ranks, found: Adapted) -> list[str]:
    """Return the modules whose tensors PEFT does not have as the plan has them, or puts elsewhere; experts only where
    there are no others, as these may have moved onto them."""
    specs = adapter.file_specs(ranks)
    wrong = {spec.name for spec in specs if found.tensors.get(spec.name) != spec.shape or spec.name in found.lost}
    modules = [module for module, rank in ranks if wrong & {spec.name for spec in adapter.file_specs([(module, rank)])}]
    return [module.name for module in modules if module.expert is None] or [module.name for module in modules]


def _require_no_more(adapter: Adapter, ranks: Ranks, found: Adapted) -> None:
    planned = {spec.name for spec in adapter.file_specs(ranks)}
    if more := sorted(found.tensors.keys() - planned - found.whole.keys()):
        raise TargetError(
            f"PEFT would put adapters on more than the chosen modules ({', '.join(more[:3])}); choose others with "
            "--target-modules or --exclude"
        )


def _refused(
    skeleton: Skeleton,
    recipe: Recipe,
    adapter: Adapter,
    architecture: Architecture,
    ranks: Ranks,
    refusal: Refused,
) -> dict[str, str]:
    """Return the modules of those kinds that PEFT refuses alone, tried on one of each, with what it says."""
    kinds: dict[tuple[str, type | None], list[tuple[LinearModule, int]]] = {}
    for module, rank in ranks:
        name = module.name if module.expert is None else module.parameter
        kinds.setdefault((_last(name), architecture.classes.get(module.name)), []).append((module, rank))
    found = {}
    for alike in kinds.values():
        try:
            _adapted(skeleton, recipe, adapter, architecture, alike[:1])
        except Refused as reason:
            found.update({module.name: f"peft: {reason}" for module, _ in alike})
    if not found:
        raise TargetError(f"PEFT refuses the adapter: {refusal}; choose others with --target-modules or --exclude")
    return found


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
