"""What experts read: the tokens that reach each, caught while its block computes one expert after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby

import torch
from torch import nn

from qinit.calibration.meter import Meter
from qinit.files.tensors import slice_name
from qinit.plan.plan import LayerPlan
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

    def __init__(self, layers: Sequence[LayerPlan], device: torch.device, pool: Meter | None = None) -> None:
        self.own = {layer.target.name: Meter([layer], device) for layer in layers}
        self.known = pool is not None
        self.pool = Meter(layers[:1], device) if pool is None else pool

    def add(self, name: str, x: torch.Tensor) -> None:
        """Add the tokens x [n, in] that have reached an expert of the parameter."""
        if name in self.own:
            self.own[name].add(x)
        if not self.known:
            self.pool.add(x)

    def statistics(self, layer: LayerPlan) -> Statistics | None:
        """Return an expert's statistics, shrunk, None if no token has reached it."""
        own, pool = self.own.pop(layer.target.name), self.pool
        if own.statistics(layer) is None or pool.statistics(layer) is None:
            return None
        shared = min(len(own.hessian), pool.tokens - own.tokens)
        weight = shared / (own.tokens + shared)
        hessian, magnitude, mean = (
            torch.lerp(mine, all_, weight)
            for mine, all_ in ((own.hessian, pool.hessian), (own.magnitude, pool.magnitude), (own.mean, pool.mean))
        )
        return Statistics(hessian, magnitude, own.tokens, shared=shared, mean=mean)
