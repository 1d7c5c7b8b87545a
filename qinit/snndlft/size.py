"""How many values train: of all layers, of half of them and of one, counted on a model that may have no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from qinit.snndlft.layers import layers_of


@dataclass(frozen=True)
class Sizes:
    """Trainable values in a step at `rank` triplets in each module; of half and of one of the layers, these are the
    larger ones where they differ."""

    rank: int
    all: int
    half: int
    single: int


def sizes(model: PeftModel, rank: int) -> Sizes:
    """Count the adapters of a model that `adapt` made, at a mean rank: target_r when ranks are allocated. At init_r it
    is what the optimizer sees: masked triplets are in it. A classifier's head, which trains too, is not counted."""
    tuner: Any = model.base_model
    found = sorted(
        (layer.size_at(rank) for layer in layers_of(tuner.model, tuner.trainable_adapter_name)), reverse=True
    )
    return Sizes(rank, sum(found), sum(found[: (len(found) + 1) // 2]), found[0])
