"""What errors at the layers' outputs cost the model: the output side of the K-FAC metric."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

import torch

from qinit.calibration.backward import backward
from qinit.calibration.probe import OverflowedError, Part, Probe
from qinit.calibration.shards import SPARE
from qinit.events import Measuring
from qinit.linalg.low_rank import OutputMetric
from qinit.plan.plan import Plan
from qinit.processes.group import ALONE, Processes
from qinit.text.samples import Portion, Samples

DIRECTIONS = 32  # of G that are kept: more start no closer, and [out, out] would be the largest thing in memory
STEPS = 3  # of subspace iteration, for each batch, from the directions of those before
SHRINKAGE = 0.3  # of the diagonal, added to it: a few thousand tokens do not tell correlations well
FLOOR = 1e-3  # of the mean diagonal, added too: outputs that the loss never sees


def output_metrics(
    plan: Plan,
    samples: Samples,
    device: torch.device,
    scratch: Path | None = None,
    processes: Processes = ALONE,
    portion: Portion = int,
) -> Generator[Measuring, None, dict[str, OutputMetric]]:
    """Measure G = E[g g'] for every layer that a gradient reaches, g the gradient at its output of the log-probability
    of a token drawn from the model's own distribution.

    With H = E[x x'] at the input, tr(G E H E') / 2 is the KL divergence of the next token that an error E of the
    weight causes, to second order and with g and x taken to be independent (K-FAC: Martens and Grosse 2015,
    arXiv:1503.05671). Kept are the leading directions of G and its diagonal, shrunk, mean diagonal 1.
    Several `processes` each take their shards of the text and put together what they have found, in the shards' order.
    Nothing is returned for a model that overflows. Raises CalibrationError and CheckpointError.
    """
    try:
        probe: _Moments = yield from backward(partial(_Moments, plan, samples, device, processes, portion), scratch)
    except OverflowedError:  # who looks at the activations will say where
        return {}
    return {name: metric for name in probe.all if (metric := probe.metric(name)) is not None}


@dataclass
class _Moment:
    """What is kept of G: its diagonal `power` [out], and its `leading` directions [k, out], rows R whose R' R is near
    to G."""

    power: torch.Tensor
    leading: torch.Tensor


class _Moments(Probe):
    """Adds up the diagonal of G, and keeps its leading directions as they show: of each shard alone, then of all."""

    in_shards = True

    def __init__(
        self, plan: Plan, samples: Samples, device: torch.device, processes: Processes, portion: Portion
    ) -> None:
        super().__init__(plan, samples, device, processes, portion)
        self.found: dict[str, dict[int, _Moment]] = {}  # by layer and shard
        self.all: dict[str, _Moment] = {}

    def add(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        power = gradient.square().sum(0)
        if self.shard is None or self.shard == SPARE or not bool(power.sum() > 0):
            return
        shards = self.found.setdefault(name, {})
        known = shards.get(self.shard)
        shards[self.shard] = self._kept(power, gradient) if known is None else self._joined(known, power, gradient)

    def done(self, part: Part) -> None:
        names = [layer.target.name for layer in part.layers]
        own = {name: self.found.pop(name) for name in names if name in self.found}
        if not self.processes.several:
            shares = [own]
        else:
            here = {name: _moved(shards, torch.device("cpu")) for name, shards in own.items()}
            shares = self.processes.gather(here, "gradients")
        for name in names:
            found = [shard for share in shares for shard in _moved(share.get(name, {}), self.device).values()]
            for one in found:
                known = self.all.get(name)
                self.all[name] = one if known is None else self._joined(known, one.power, one.leading)

    def _kept(self, power: torch.Tensor, rows: torch.Tensor) -> _Moment:
        generator = torch.Generator().manual_seed(self.plan.recipe.seed)
        count = min(DIRECTIONS, rows.shape[1])
        basis = torch.randn(rows.shape[1], count, generator=generator).to(rows.device)
        return _Moment(power, _leading(rows, basis))

    def _joined(self, known: _Moment, power: torch.Tensor, rows: torch.Tensor) -> _Moment:
        """Return what is kept of the sum of two: `rows` [n, out] have G as rows' rows."""
        return _Moment(known.power + power, _leading(torch.cat([known.leading, rows]), known.leading.T))

    def metric(self, name: str) -> OutputMetric | None:
        """Return a layer's metric; None where gradients overflow."""
        power, leading = self.all[name].power, self.all[name].leading
        mean = float(power.mean())
        if not isfinite(mean) or not bool(torch.isfinite(leading).all()):
            return None
        rest = (power - leading.square().sum(0)).clamp(min=0) + SHRINKAGE * power
        return OutputMetric(leading / mean**0.5, rest / mean + FLOOR)


def _leading(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return the leading directions [k, out] of rows' rows, as many as `basis` [out, k] has that the search starts
    from."""
    for _ in range(STEPS):
        basis = rows.T @ torch.linalg.qr(rows @ basis).Q
    return basis.T


def _moved(shards: dict[int, _Moment], device: torch.device) -> dict[int, _Moment]:
    return {shard: _Moment(one.power.to(device), one.leading.to(device)) for shard, one in shards.items()}
