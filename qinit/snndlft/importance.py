"""Which layers train on: the importance of a layer, and the choice by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qinit.snndlft.layers import Layer

# What a layer's importance is mixed of, each as a share of its sum over all layers.
MIX = {"triplets": 0.5, "gradient": 0.25, "uncertainty": 0.25}


class LayerGradients:
    """Of each layer's gradients the magnitude (root mean square over its adapters), smoothed by beta1, and its
    uncertainty: how far the magnitude is from that, smoothed by beta2. As AdaLoRA does for each value. A layer without
    gradients keeps what it had."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.magnitude: dict[str, float] = {}
        self.uncertainty: dict[str, float] = {}

    def update(self, layers: Iterable[Layer]) -> None:
        for layer in layers:
            gradients = [p.grad.detach().flatten().float() for p in layer.parameters if p.grad is not None]
            if not gradients:
                continue
            found = float(torch.cat(gradients).square().mean().sqrt())
            before = self.magnitude.get(layer.name, 0.0)
            smooth = self.magnitude[layer.name] = self.beta1 * before + (1 - self.beta1) * found
            spread = self.uncertainty.get(layer.name, 0.0)
            self.uncertainty[layer.name] = self.beta2 * spread + (1 - self.beta2) * abs(found - smooth)

    def mixed(self, triplets: Mapping[str, float]) -> dict[str, float]:
        """Return each layer's importance by MIX from the sums of its triplets' importance."""
        parts = {"triplets": triplets, "gradient": self.magnitude, "uncertainty": self.uncertainty}
        shares = {part: _shares(values, triplets) for part, values in parts.items()}
        return {name: sum(weight * shares[part][name] for part, weight in MIX.items()) for name in triplets}

    def to_json(self) -> dict[str, Any]:
        return {"magnitude": self.magnitude, "uncertainty": self.uncertainty}


def _shares(values: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    found = {name: values.get(name, 0.0) for name in names}
    total = sum(found.values())
    return {name: value / total if total > 0 else 0.0 for name, value in found.items()}


def choose(importance: Mapping[str, float], layer_wise: str) -> list[str]:
    """Return the layers that train on, in the model's order: the best (`single`), the better half (`half`; of an odd
    number the larger half), or `all`. Of equals the earlier one."""
    count = {"single": 1, "half": (len(importance) + 1) // 2, "all": len(importance)}[layer_wise]
    best = sorted(importance, key=lambda name: -importance[name])[:count]
    return [name for name in importance if name in best]
