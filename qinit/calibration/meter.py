"""What a layer sees while a model reads the calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qinit.calibration.shards import SPARE
from qinit.clock import counted
from qinit.linalg.hessian import add_second_moment, lower_blocks, squared
from qinit.plan.parts import LayerPlan
from qinit.processes.group import ALONE, Processes
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


class _Means:
    """Running means over the tokens of a shard, or of several: E[x x'] in blocks, E|x|, E[x], E[g x'] and E[d x'] by
    name; `parts` are all of them in a fixed order."""

    def __init__(self, size: int, device: torch.device, gap: bool, own: Mapping[str, int]) -> None:
        self.tokens = 0
        self.hessian = lower_blocks(size, device)
        self.magnitude, self.mean = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.gap = torch.zeros((size, size), device=device) if gap else None
        self.own = {name: torch.zeros((rows, size), device=device) for name, rows in own.items()}

    @property
    def parts(self) -> list[torch.Tensor]:
        gap = () if self.gap is None else (self.gap,)
        return [*self.hessian, self.magnitude, self.mean, *gap, *self.own.values()]


class Meter:
    """Adds up the statistics of layers that share an input, as running means in float32: each shard of the text alone,
    then the shards in their order, those of all `processes`.

    Where `originals` are given, by the layers' names, it adds up the drift too: E[d x'], d what is still missing where
    a layer writes to. That is W E[g x'] + E[s x'] with g the gap at the layer's input, which one product for all layers
    of the group tells, and s that at what its output is added to, where this lies before it; or E[e x'] with e the gap
    at the block's output.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlan],
        device: torch.device,
        originals: Mapping[str, Original] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.size, self.device, self.processes = layers[0].target.module.in_features, device, processes
        self.originals = originals
        self.with_gap = False
        self.rows: dict[str, int] = {}  # of what is added up for a layer alone
        if originals is not None:
            through = {name: original.weight for name, original in originals.items() if original.writes != "output"}
            # Where the layers are narrow, their outputs are less work than all pairs of inputs.
            self.narrow = 2 * sum(map(len, through.values())) < self.size
            self.with_gap = bool(through) and not self.narrow
            for name, original in originals.items():
                if self.narrow or original.writes is not None:
                    self.rows[name] = len(original.weight)
        self.shard: int | None = None
        self.open: _Means | None = None  # of the shard that is being read
        self.read: list[_Means] = []  # of those before it; in the first process they are one
        self.hessian: torch.Tensor | None = None
        self.total: _Means | None = None

    @counted("statistics")
    def add(self, x: torch.Tensor, gap: Gap | None = None, shard: int = 0) -> None:
        """Add tokens x [n, in] of a shard and how far the original model is from them (None: not to be told, or not at
        all). A shard's tokens come one after the other."""
        if not len(x) or shard == SPARE:
            return
        assert self.total is None, "summed up already"
        if shard != self.shard:
            self._close()
            self.shard = shard
        if self.open is None:
            self.open = self._means()
        x, means = x.float(), self.open
        means.tokens += len(x)
        old, new = 1 - len(x) / means.tokens, 1 / means.tokens
        add_second_moment(means.hessian, x, old, new)
        means.magnitude.mul_(old).add_(x.abs().sum(0), alpha=new)
        means.mean.mul_(old).add_(x.sum(0), alpha=new)
        if means.gap is not None:
            _mean(means.gap, None if gap is None else gap.x, x, old, new)
        for name, own in means.own.items():
            _mean(own, None if gap is None else self._missing(name, gap), x, old, new)

    def _means(self) -> _Means:
        return _Means(self.size, self.device, self.with_gap, self.rows)

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

    def _close(self) -> None:
        """Take the open shard for read: the first process adds it to those before it, another keeps each until those
        of the processes before it have come."""
        if self.open is None or not self.open.tokens:
            return
        if self.read and self.processes.first:
            for total, part in zip(self.read[0].parts, self.open.parts, strict=True):
                _add(total, part, self.read[0].tokens, self.open.tokens)
            self.read[0].tokens += self.open.tokens
            self.open.tokens = 0  # its room is used again
        else:
            self.read.append(self.open)
            self.open = None

    @counted("statistics")
    def sum_up(self) -> None:
        """Add up what all processes have seen; nothing is added after it. All of them call it."""
        self._close()
        self.open = None
        counts = self.processes.gather([means.tokens for means in self.read], "a meter's tokens")
        if not any(map(sum, counts)):
            self.total = _Means(0, self.device, False, {})
            return
        total = self.read[0] if self.read and self.processes.first else self._means()
        total.tokens = sum(map(sum, counts))
        before, parts = sum(map(sum, counts[: self.processes.rank])), total.parts
        shards = [(means.tokens, means.parts) for means in self.read]

        def add(place: int) -> None:
            tokens = before
            for count, own in shards:
                _add(parts[place], own[place], tokens, count)
                tokens += count

        self.processes.chain(parts, add, "a meter's means")
        self.read, self.total = [], total

    @counted("statistics")
    def statistics(self, layer: LayerPlan) -> Statistics | None:
        """Return a layer's statistics, None if no token has reached it. Sums up where that is not done."""
        if self.total is None:
            self.sum_up()
        total = self.total
        assert total is not None
        if self.hessian is None and total.tokens:
            self.hessian = squared(total.hessian)
        if self.hessian is None or not bool(self.hessian.any()):
            return None
        drift = self._drift(layer.target.name, total)
        return Statistics(self.hessian, total.magnitude, total.tokens, drift, mean=total.mean, own=True)

    def _drift(self, name: str, total: _Means) -> torch.Tensor | None:
        if self.originals is None:
            return None
        original, own = self.originals[name], total.own.get(name)
        if original.writes == "output" or total.gap is None:
            return own
        through = original.weight @ total.gap
        return through if own is None else through.add_(own)


def _add(total: torch.Tensor, part: torch.Tensor, before: int, count: int) -> None:
    """Add a shard's mean over `count` tokens to that over the tokens `before`, in place."""
    if before:
        total.mul_(before / (before + count)).add_(part, alpha=count / (before + count))
    else:
        total.copy_(part)


def _mean(moment: torch.Tensor, left: torch.Tensor | None, x: torch.Tensor, old: float, new: float) -> None:
    """Set M to `old` M + `new` l' x in place; l [n, out] is zero where there is none."""
    if left is None:
        moment.mul_(old)
    else:
        moment.addmm_(left.float().T, x, beta=old, alpha=new)
