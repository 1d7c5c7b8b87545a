"""Which parameters of a model share a tensor, by its own `tie_weights`, and how config.json says that none do."""

from __future__ import annotations

from typing import Any

from qinit.merge.steps import Tie
from qinit.stock.skeleton import Skeleton
from qinit.stream.weights import ModelWeights

KEY = "tie_word_embeddings"


def ties(weights: ModelWeights) -> list[Tie]:
    """Return the parameters of which one tensor of the checkpoint is all. Where each has its own, the loader takes
    these."""
    model = Skeleton.of(weights.checkpoint, weights.trust_remote_code).build()
    model.tie_weights()
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found = []
    for group in groups.values():
        if len(group) > 1 and any(weights.names.find(name) is None for name in group):
            owners: dict[tuple[int, str], list[str]] = {}
            for name in group:
                module, _, last = name.rpartition(".")
                owners.setdefault((id(model.get_submodule(module)), last), []).append(name)
            found.append(list(owners.values()))
    return found


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration whose model has no tied embeddings."""
    parts = {key: untied(value) for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    return {**config, **parts, KEY: False}
