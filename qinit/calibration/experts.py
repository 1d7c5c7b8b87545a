"""What experts read: the tokens that reach each, caught while its block computes one expert after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby

import torch
from torch import nn

from qinit.calibration.meter import Meter
from qinit.files.tensors import slice_name
from qinit.plan.parts import LayerPlan
from qinit.processes.group import ALONE, Processes
from qinit.solver.statistics import Statistics
from qinit.source.products import Product, Products, one_by_one
from qinit.stream.calls import Call, Stop

PORTION_BYTES = 1 << 30  # of the H matrices of experts that are measured at once


def parameters_of(layers: Collection[str]) -> list[str]:
    """Return the names of the 3-D parameters that hold the experts among these names."""
    return list(dict.fromkeys(name.rpartition("[")[0] for name in layers if name.endswith("]")))


@contextmanager
def listening(
    module: nn.Module,
    parameters: Collection[str],
    read: Callable[[str, torch.Tensor], None],
    wanted: Collection[str] | None = None,
) -> Iterator[None]:
    """Call `read` with an expert's name (of those `wanted`, or all) and the tokens [tokens, in] that reach it, for each
    product within. Tokens that are zero are left out: where every expert is given all tokens, those that it is not to
    compute are."""

    def seen(product: Product) -> None:
        name, x = slice_name(product.parameter, product.index), product.x.detach()
        if wanted is not None and name not in wanted:
            return
        x = x[x.any(-1)]
        if len(x):
            read(name, x)

    if not parameters:
        yield
        return
    with one_by_one(module), Products({name: module.get_parameter(name) for name in parameters}, seen):
        yield


def caught_by_experts(block: nn.Module, call: Call, hidden: torch.Tensor, parameter: str) -> dict[str, torch.Tensor]:
    """Run a block as far as it computes a parameter's experts, and return what they read, by their names."""
    inputs: dict[str, torch.Tensor] = {}

    def read(name: str, x: torch.Tensor) -> None:
        inputs[name] = torch.cat([inputs[name], x]) if name in inputs else x

    def stop(*_: object) -> None:
        raise Stop

    handle = block.get_submodule(parameter.rpartition(".")[0]).register_forward_hook(stop)
    try:
        with suppress(Stop), listening(block, [parameter], read):
            call(block, hidden)
    finally:
        handle.remove()
    return inputs


def portions(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Cut the experts of one parameter into portions whose H matrices fit into PORTION_BYTES, one at least in each."""
    size = max(1, PORTION_BYTES // (4 * layers[0].target.module.in_features ** 2))
    numbered = groupby(enumerate(layers), key=lambda pair: pair[0] // size)
    return [[layer for _, layer in some] for _, some in numbered]


class ExpertMeters:
    """Adds up the statistics of some experts of one parameter, and of all of them together (`pool`; one that is given
    is known already).

    An expert's own are shrunk towards those of all: these count as many tokens as the experts have inputs, and not more
    than other experts have seen. An expert that no token reaches has none.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlan],
        device: torch.device,
        pool: Meter | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.own = {layer.target.name: Meter([layer], device, processes=processes) for layer in layers}
        self.known = pool is not None
        self.pool = Meter(layers[:1], device, processes=processes) if pool is None else pool

    def add(self, name: str, x: torch.Tensor, shard: int = 0) -> None:
        """Add the tokens x [n, in] of a shard that have reached an expert of the parameter."""
        if name in self.own:
            self.own[name].add(x, shard=shard)
        if not self.known:
            self.pool.add(x, shard=shard)

    def sum_up(self) -> None:
        """Add up what all processes have seen; nothing is added after it."""
        for meter in (*self.own.values(), *(() if self.known else (self.pool,))):
            meter.sum_up()

    def statistics(self, layer: LayerPlan) -> Statistics | None:
        """Return an expert's statistics, shrunk, None if no token has reached it."""
        own, pool = self.own.pop(layer.target.name).statistics(layer), self.pool.statistics(layer)
        if own is None or pool is None:
            return None
        shared = min(len(own.hessian), pool.tokens - own.tokens)
        weight = shared / (own.tokens + shared)
        hessian = torch.lerp(own.hessian, pool.hessian, weight)
        magnitude = torch.lerp(own.magnitude, pool.magnitude, weight)
        mean = None if own.mean is None or pool.mean is None else torch.lerp(own.mean, pool.mean, weight)
        return Statistics(hessian, magnitude, own.tokens, shared=shared, mean=mean)
