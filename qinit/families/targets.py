"""Which linear modules of a base a family adapts, by its architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import ALL_LINEAR, Architecture, LinearModule, Target, read_architecture, select
from qinit.stream.weights import ModelWeights


@dataclass(frozen=True)
class Chosen:
    """The modules to adapt, and the architecture that they belong to."""

    architecture: Architecture
    modules: tuple[LinearModule, ...]

    @cached_property
    def names(self) -> list[str]:
        return [module.name for module in self.modules]


def choose(
    checkpoint: Checkpoint, wanted: str | None, exclude: str | None, *, trust_remote_code: bool = False
) -> Chosen:
    """Return those of a base's linear modules that are `wanted` (None: all that read text), without the routers of
    experts. Raises TargetError where a part of the choice matches nothing."""
    architecture = read_architecture(checkpoint, trust_remote_code)
    weights = ModelWeights(checkpoint, architecture, trust_remote_code=trust_remote_code)
    packed = weights.packed()
    targets = []
    for module in architecture.linear:
        parts = packed.get(module.parameter) or {}
        stored = weights.names.find(module.parameter) or next(iter(parts.values()), None)
        if stored is not None and module.name not in architecture.routers:
            targets.append(Target(module, stored))
    chosen = select(targets, wanted or ALL_LINEAR, exclude, architecture.in_language)
    return Chosen(architecture, tuple(target.module for target in chosen))


def feed_forward_of(chosen: Chosen) -> list[str]:
    """Return the modules at the ends of feed-forward parts: those that narrow, and that are in no attention by the
    classes of what they are in."""
    return [
        module.name
        for module in chosen.modules
        if module.in_features > module.out_features and not _in_attention(module.name, chosen.architecture)
    ]


def _in_attention(name: str, architecture: Architecture) -> bool:
    parts = name.split(".")
    above = (architecture.classes.get(".".join(parts[:end])) for end in range(1, len(parts)))
    return any("attention" in kind.__name__.lower() for kind in above if kind is not None)
