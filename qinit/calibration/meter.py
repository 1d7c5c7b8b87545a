"""What a layer sees while a model reads the calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qinit.clock import counted
from qinit.linalg.hessian import add_second_moment, mirror
from qinit.plan.plan import LayerPlan
from qinit.solver.statistics import Statistics


@dataclass(frozen=True)
class Gap:
    """The original model's activations less the repaired one's, a row per token: at the layers' input x [n, in], and
    where a layer's output is added to on the way, and at their block's output [n, width]; None where nobody asks."""

    x: torch.Tensor | None
    start: torch.Tensor | None
    end: torch.Tensor | None


@dataclass(frozen=True)
class Original:
    """A layer's weight W [out, in] in the original model, and what the layer's output is added to there: see Group."""

    weight: torch.Tensor
    writes: str | None


class Meter:
    """Adds up the statistics of layers that share an input, as running means in float32.

    Where `originals` are given, by the layers' names, it adds up the drift too: E[d x'], d what is still missing where
    a layer writes to. That is W E[g x'] + E[s x'] with g the gap at the layer's input, which one product for all layers
    of the group tells, and s that at what its output is added to, where this lies before it; or E[e x'] with e the gap
    at the block's output.
    """

    def __init__(
        self, layers: Sequence[LayerPlan], device: torch.device, originals: Mapping[str, Original] | None = None
    ) -> None:
        size = layers[0].target.module.in_features
        self.tokens = 0
        self.hessian = torch.zeros((size, size), device=device)
        self.magnitude, self.mean = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.originals = originals
        self.gap: torch.Tensor | None = None
        self.own: dict[str, torch.Tensor] = {}
        if originals is not None:
            through = {name: original.weight for name, original in originals.items() if original.writes != "output"}
            # Where the layers are narrow, their outputs are less work than all pairs of inputs.
            self.narrow = 2 * sum(map(len, through.values())) < size
            if through and not self.narrow:
                self.gap = torch.zeros((size, size), device=device)
            for name, original in originals.items():
                if self.narrow or original.writes is not None:
                    self.own[name] = torch.zeros((len(original.weight), size), device=device)

    @counted("statistics")
    def add(self, x: torch.Tensor, gap: Gap | None = None) -> None:
        """Add tokens x [n, in] and how far the original model is from them (None: not to be told, or not at all)."""
        if not len(x):
            return
        x = x.float()
        self.tokens += len(x)
        old, new = 1 - len(x) / self.tokens, 1 / self.tokens
        add_second_moment(self.hessian, x, old, new)
        self.magnitude.mul_(old).add_(x.abs().sum(0), alpha=new)
        self.mean.mul_(old).add_(x.sum(0), alpha=new)
        if self.gap is not None:
            _mean(self.gap, None if gap is None else gap.x, x, old, new)
        for name, own in self.own.items():
            _mean(own, None if gap is None else self._missing(name, gap), x, old, new)

    def _missing(self, name: str, gap: Gap) -> torch.Tensor | None:
        """Return the part of d [n, out] that is not told by the gap at the input alone."""
        assert self.originals is not None
        original = self.originals[name]
        if original.writes == "output":
            return gap.end
        at_start = gap.start if original.writes is not None else None
        if not self.narrow:
            return at_start
        assert gap.x is not None
        through = gap.x.float() @ original.weight.T
        return through if at_start is None else through.add_(at_start)

    @counted("statistics")
    def statistics(self, layer: LayerPlan) -> Statistics | None:
        """Return a layer's statistics, None if no token has reached it."""
        if not self.tokens or not bool(self.hessian.any()):
            return None
        mirror(self.hessian)
        return Statistics(self.hessian, self.magnitude, self.tokens, self._drift(layer.target.name), mean=self.mean)

    def _drift(self, name: str) -> torch.Tensor | None:
        if self.originals is None:
            return None
        original, own = self.originals[name], self.own.get(name)
        if original.writes == "output" or self.gap is None:
            return own
        through = original.weight @ self.gap
        return through if own is None else through.add_(own)


def _mean(moment: torch.Tensor, left: torch.Tensor | None, x: torch.Tensor, old: float, new: float) -> None:
    """Set M to `old` M + `new` l' x in place; l [n, out] is zero where there is none."""
    if left is None:
        moment.mul_(old)
    else:
        moment.addmm_(left.float().T, x, beta=old, alpha=new)
