"""Scales that a base has moved between layers, as AWQ and SmoothQuant do: found, and the source brought to the same.

A norm that gives 1 / s of what it gave, and layers behind it with W diag(s), are the same model in other coordinates.
So are diag(1 / t) W of a layer and W diag(t) of the one that reads its outputs; where several heads read the output of
one, as those of grouped queries read a value, t is repeated for each. An adapter is fitted to W diag(s) - Q, where
W diag(s) is what the base was rounded from. s is the ratio of what the norms give, t that of Q to W by rows of the one
and columns of the other layer; neither is taken on trust: Q must lie near what comes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.scaled import ScaledTensor
from qinit.files.tensors import StoredTensor
from qinit.formats import format_of
from qinit.linalg.chunks import row_chunks
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.runner.given import SAME, apart, base_weights, require_same_rest
from qinit.runner.layer import read_weight
from qinit.stock.feeds import Feed, feeds
from qinit.stock.inputs import possible_inputs
from qinit.stock.skeleton import Skeleton

CPU = torch.device("cpu")
EXPLAINED = 0.5  # of what a layer has lost: more than that in a scale by rows or columns is a scale that was moved
PROBES = 4


def in_its_coordinates(plan: Plan) -> Plan:
    """Return a plan whose source is in the coordinates of its base; the plan itself where no scales were moved. One
    layer is in memory at a time. Raises CheckpointError for a base that is not the source in any coordinates: for
    other values in what it has not quantized, and for scales that are not made good elsewhere."""
    assert plan.given is not None
    search = _Search(plan)
    norms = [feed for feed in search.feeds if search.norm_moved(feed)]
    reader = format_of(plan.given.checkpoint.config)
    if norms or (reader is not None and reader.moves_scales):
        for feed in norms:
            search.move_norm(feed)
        search.move_pairs()
        plan = search.moved()
    require_same_rest(plan)
    return plan


@dataclass(frozen=True)
class _Sums:
    """Of each row or column of Q and W the sums of Q Q, Q W and W W, float64."""

    qq: torch.Tensor
    qw: torch.Tensor
    ww: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        """What W is multiplied by to be nearest to Q, 1 where there is nothing."""
        return torch.where((self.qw > 0) & (self.ww > 0), self.qw / self.ww.clamp_min(1e-300), 1.0)

    @property
    def explained(self) -> float:
        """The share of |Q - W|^2 that these scales take away, 0 where W is nearly Q anyway."""
        lost = float((self.qq - 2 * self.qw + self.ww).sum())
        left = float((self.qq - self.scale.square() * self.ww)[self.qw > 0].sum() + self.qq[self.qw <= 0].sum())
        return 1 - left / lost if lost > SAME**2 * float(self.ww.sum()) else 0.0


@dataclass(frozen=True)
class _Fit:
    rows: _Sums
    columns: _Sums


class _Search:
    """The source's `tensors` by name, brought nearer to the base's coordinates step by step."""

    def __init__(self, plan: Plan) -> None:
        assert plan.given is not None
        self.plan, self.base = plan, base_weights(plan)
        self.tensors = dict(plan.checkpoint.tensors)
        self.names = plan.architecture.names_in(plan.checkpoint)
        self.layers = {layer.target.name: layer for layer in plan.quantized}
        self.modules = {module.name: module for module in plan.architecture.linear}
        model = Skeleton.of(plan.checkpoint, plan.recipe.trust_remote_code).build()
        self.model = model
        linear = {name: model.get_submodule(name) for name in self.modules}
        self.feeds = feeds(model, linear, list(possible_inputs(model, plan.checkpoint.directory)))

    def _both(self, parameter: str) -> tuple[StoredTensor, StoredTensor] | None:
        """Return a parameter's tensor in the source and in the base, where both are plain and of one shape."""
        mine, other = self.names.find(parameter), self.base.names.find(parameter)
        if mine is None or other is None or mine.shape != other.shape:
            return None
        return mine, other

    def _parameters(self, feed: Feed) -> list[tuple[str, StoredTensor, StoredTensor]]:
        own = [name for name, _ in self.model.get_submodule(feed.norm).named_parameters(recurse=False)]
        pairs = [(name, self._both(f"{feed.norm}.{name}")) for name in own]
        return [(name, *pair) for name, pair in pairs if pair is not None]

    def norm_moved(self, feed: Feed) -> bool:
        """Whether a norm is another in the base."""
        return any(apart(mine, other) > SAME for _, mine, other in self._parameters(feed))

    def move_norm(self, feed: Feed) -> None:
        """Take the base's norm, and scale what reads it."""
        if feed.other:
            raise self._refused(feed.norm, f"it is another than the source's, and {feed.other} reads it too")
        found = self._parameters(feed)
        scale = self._ratio(feed, *({name: pair[side].read() for name, *pair in found} for side in (0, 1)))
        for _, mine, other in found:
            self.tensors[mine.name] = replace(other, name=mine.name)
        for reader in feed.readers:
            self._scale(reader, columns=scale)

    def _ratio(self, feed: Feed, mine: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what the source's norm gives over what the base's gives, by channel."""
        width = max(value.numel() for value in mine.values())
        x = torch.randn(PROBES, width, generator=torch.Generator().manual_seed(0))
        ours, theirs = (self._given_by(feed.norm, values, x) for values in (mine, others))
        size = theirs.square().sum(0)
        scale = torch.where(size > 0, (ours * theirs).sum(0) / size.clamp_min(1e-300), 1.0)
        missed = float((ours - scale * theirs).norm() / ours.norm().clamp_min(1e-300))
        if missed > SAME or bool((scale <= 0).any()):
            raise self._refused(feed.norm, "it is another than the source's, and not by a scale for each channel")
        return scale.float()

    def _given_by(self, norm: str, values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        module: Any = copy.deepcopy(self.model.get_submodule(norm)).to_empty(device="cpu").eval()
        with torch.no_grad():
            for name, value in values.items():
                getattr(module, name).data = value.float()
            return module(x).double()

    def move_pairs(self) -> None:
        """Scale the outputs of layers and the inputs of those that read them, where the base has done so; then hold
        every layer against the base."""
        fits = {name: self._fit(layer) for name, layer in self.layers.items() if layer.target.module.expert is None}
        for feed in self.feeds:
            first = [name for name in feed.readers if name in fits]
            for second in (name for name in feed.then if name in fits):
                found = [(*moved, name) for name in first for moved in _moved(fits[name], fits[second])]
                if not found:
                    continue
                _, outputs, inputs, name = min(found, key=lambda each: each[0])
                self._move_pair(name, second, outputs, inputs)
                fits |= {each: self._fit(self.layers[each]) for each in (name, second)}
        for name, fit in fits.items():
            share, side = max((fit.columns.explained, "inputs"), (fit.rows.explained, "outputs"))
            if share > EXPLAINED:
                what = f"a scale for each of its {side} is {100 * share:.0f} % of what it is away from the source's"
                raise self._refused(name, f"{what}, and no norm or layer beside it makes that good")

    def _move_pair(self, first: str, second: str, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
        rows = torch.ones(self.modules[first].out_features)
        rows[-len(outputs) :] = 1 / outputs
        self._scale(first, rows=rows)
        self._scale(second, columns=inputs)
        bias = self._both(f"{first}.bias")
        if bias is not None:
            mine, other = bias
            expected, found = mine.read().float() * rows, other.read().float()
            if float((found - expected).norm()) > 5 * SAME * float(expected.norm()):  # rows are measured, with noise
                raise self._refused(first, "its outputs are scaled, and its bias is not")
            self.tensors[mine.name] = replace(other, name=mine.name)

    def _scale(self, name: str, *, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
        """Scale a layer's outputs or inputs."""
        module, stored = self.modules[name], self.names.find(f"{name}.weight")
        if stored is None or stored.name not in self.tensors:
            raise self._refused(name, "scales were moved to it, and the source holds it in one tensor with others")
        factor, across = (rows, True) if rows is not None else (columns, False)
        assert factor is not None
        shape = (-1, 1) if across is not module.transposed else (1, -1)
        self.tensors[stored.name] = ScaledTensor.of(self.tensors[stored.name], factor.reshape(shape))

    def _fit(self, layer: LayerPlan) -> _Fit:
        W = read_weight(self._placed(layer), CPU)
        Q = self.base.read(layer.target.module.parameter, CPU)
        assert Q is not None
        Q = Q.T if layer.target.module.transposed else Q
        rows = [torch.zeros(len(W), dtype=torch.float64) for _ in range(3)]
        columns = [torch.zeros(W.shape[1], dtype=torch.float64) for _ in range(3)]
        for part in row_chunks(*W.shape):
            q, w = Q[part], W[part]
            for place, product in enumerate((q * q, q * w, w * w)):
                rows[place][part] = product.sum(1).double()
                columns[place] += product.sum(0)
        return _Fit(_Sums(*rows), _Sums(*columns))

    def _placed(self, layer: LayerPlan) -> LayerPlan:
        """Return a layer with its tensor as it is by now."""
        tensor = self.tensors.get(layer.target.tensor.name, layer.target.tensor)
        return replace(layer, target=replace(layer.target, tensor=tensor))

    def moved(self) -> Plan:
        """Return the plan with the source's tensors as they are by now."""
        plan = self.plan
        assert plan.given is not None
        before = plan.checkpoint.tensors
        changed = [name for name, tensor in self.tensors.items() if tensor is not before[name]]
        if not changed:
            return plan
        moved = frozenset(self.names.parameter_of[name] for name in changed)
        checkpoint = replace(plan.checkpoint, tensors=self.tensors)
        layers = tuple(self._placed(layer) for layer in plan.layers)
        return replace(plan, checkpoint=checkpoint, layers=layers, given=replace(plan.given, moved=moved))

    def _refused(self, name: str, what: str) -> CheckpointError:
        base = self.base.checkpoint.directory
        advice = "the base belongs to another model, or scales were moved there in a way that is not undone"
        return CheckpointError(f"{base}: {name}: {what}; {advice}")


def _moved(first: _Fit, second: _Fit) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """Yield, for each way in which the inputs of a layer may be the (last) outputs of another, how far apart the scales
    of the two are, and the scales by outputs and by inputs; none where the one is not made good by the other.

    The ways are all of the outputs as they stand, and heads of any width, each of which several heads read.
    """
    inputs, rows = second.columns.scale.log(), -first.rows.scale.log()
    for shared in _divisors(len(inputs)):
        count = len(inputs) // shared
        if count > len(rows):
            continue
        for width in _divisors(count) if shared > 1 else [count]:
            a, b = inputs.view(-1, shared, width), rows[-count:].view(-1, 1, width)
            both = (a.mean(1, keepdim=True) + b) / 2
            apart, size = (float(each.square().mean().sqrt()) for each in (a - b, both))
            if size > max(2 * apart, SAME):
                yield apart, both.exp().float().flatten(), both.expand_as(a).exp().float().flatten()


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
