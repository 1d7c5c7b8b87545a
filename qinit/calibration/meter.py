"""What a layer sees while the model reads the calibration text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qinit.plan.plan import LayerPlan
from qinit.solver.statistics import Statistics


class Meter:
    """Adds up the statistics of layers that share an input, as running means in float32."""

    def __init__(self, layers: Sequence[LayerPlan], device: torch.device, *, drift: bool) -> None:
        size = layers[0].target.module.in_features
        self.tokens = 0
        self.hessian = torch.zeros((size, size), device=device)
        self.magnitude = torch.zeros(size, device=device)
        self.drift = {
            layer.target.name: torch.zeros((layer.target.module.out_features, size), device=device)
            for layer in layers
            if drift
        }

    def add(self, x: torch.Tensor, differences: dict[str, torch.Tensor]) -> None:
        """Add tokens x [n, in] and, per layer, the differences d [n, out] at its output."""
        if not len(x):
            return
        x = x.float()
        self.tokens += len(x)
        old, new = 1 - len(x) / self.tokens, 1 / self.tokens
        self.hessian.addmm_(x.T, x, beta=old, alpha=new)
        self.magnitude.mul_(old).add_(x.abs().sum(0), alpha=new)
        for name, drift in self.drift.items():
            if name in differences:
                drift.addmm_(differences[name].float().T, x, beta=old, alpha=new)
            else:
                drift.mul_(old)

    def statistics(self, layer: LayerPlan) -> Statistics | None:
        """Return a layer's statistics, None if no token has reached it."""
        if not self.tokens or not bool(self.hessian.any()):
            return None
        return Statistics(self.hessian, self.magnitude, self.tokens, self.drift.get(layer.target.name))
