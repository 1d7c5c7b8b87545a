"""What errors at the layers' outputs cost the model: the output side of the K-FAC metric."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from math import isfinite
from pathlib import Path

import torch

from qinit.calibration.backward import OverflowedError, Probe, backward
from qinit.events import Measuring
from qinit.linalg.low_rank import OutputMetric
from qinit.plan.plan import Plan
from qinit.text.samples import Samples

DIRECTIONS = 32  # of G that are kept: more start no closer, and [out, out] would be the largest thing in memory
STEPS = 3  # of subspace iteration, for each batch, from the directions of those before
SHRINKAGE = 0.3  # of the diagonal, added to it: a few thousand tokens do not tell correlations well
FLOOR = 1e-3  # of the mean diagonal, added too: outputs that the loss never sees


def output_metrics(
    plan: Plan, samples: Samples, device: torch.device, scratch: Path | None = None
) -> Generator[Measuring, None, dict[str, OutputMetric]]:
    """Measure G = E[g g'] for every layer that a gradient reaches, g the gradient at its output of the log-probability
    of a token drawn from the model's own distribution.

    With H = E[x x'] at the input, tr(G E H E') / 2 is the KL divergence of the next token that an error E of the
    weight causes, to second order and with g and x taken to be independent (K-FAC: Martens and Grosse 2015,
    arXiv:1503.05671). Kept are the leading directions of G and its diagonal, shrunk, mean diagonal 1.
    Nothing is returned for a model that overflows. Raises CalibrationError and CheckpointError.
    """
    try:
        probe: _Moments = yield from backward(partial(_Moments, plan, samples, device), scratch)
    except OverflowedError:  # who looks at the activations will say where
        return {}
    return {name: metric for name in probe.power if (metric := probe.metric(name)) is not None}


class _Moments(Probe):
    """Adds up the diagonal of G, and keeps its leading directions as they show."""

    def __init__(self, plan: Plan, samples: Samples, device: torch.device) -> None:
        super().__init__(plan, samples, device)
        self.power: dict[str, torch.Tensor] = {}
        self.leading: dict[str, torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        power = gradient.square().sum(0)
        if not bool(power.sum() > 0):
            return
        known = self.leading.get(name)
        if known is None:
            generator = torch.Generator().manual_seed(self.plan.recipe.seed)
            count = min(DIRECTIONS, gradient.shape[1])
            rows, basis = gradient, torch.randn(gradient.shape[1], count, generator=generator).to(gradient.device)
            self.power[name] = power
        else:
            rows, basis = torch.cat([known, gradient]), known.T
            self.power[name] += power
        for _ in range(STEPS):
            basis = rows.T @ torch.linalg.qr(rows @ basis).Q
        self.leading[name] = basis.T

    def metric(self, name: str) -> OutputMetric | None:
        """Return a layer's metric; None where gradients overflow."""
        power, leading = self.power[name], self.leading[name]
        mean = float(power.mean())
        if not isfinite(mean) or not bool(torch.isfinite(leading).all()):
            return None
        rest = (power - leading.square().sum(0)).clamp(min=0) + SHRINKAGE * power
        return OutputMetric(leading / mean**0.5, rest / mean + FLOOR)
