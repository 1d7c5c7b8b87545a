"""Layers dealt out: each process solves its part, the first one writes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import zip_longest

import torch

from qinit.events import Done, Event, Working
from qinit.machine import CPU
from qinit.plan.parts import LayerPlan
from qinit.processes.deal import deal, rounds
from qinit.processes.group import ALONE, Processes
from qinit.report.report import LayerRow
from qinit.runner.given import read_given
from qinit.runner.job import Job
from qinit.runner.layer import read_weight, solve_layer
from qinit.runner.room import moved, on_device_or_host
from qinit.solver.spec import Gradient

ROUND_WEIGHTS = 1 << 24  # that a process solves before it hands them over: a killed run loses as much

Solved = tuple[dict[str, torch.Tensor], LayerRow]


def solve_together(
    job: Job, layers: Sequence[LayerPlan], solve: Callable[[LayerPlan, Processes], Solved]
) -> Generator[Event, None, list[Solved]]:
    """Solve layers that do not depend on each other, each by one process, or one by all where there is no other for
    these to do; all are given all that comes of it, in the layers' order. `solve` is told who does it."""
    if len(layers) == 1 and job.plan.recipe.row.solver == "calibrated" and job.device == CPU:
        yield Working(layers[0].target.tensor.name, layers[0].target.nbytes)
        return [solve(layers[0], job.processes)]
    sizes = [layer.weights for layer in layers]
    owners = deal(sizes, job.processes.count)
    own: dict[int, Solved] = {}
    for number, (layer, owner) in enumerate(zip(layers, owners, strict=True)):
        if owner == job.processes.rank:
            yield Working(layer.target.tensor.name, layer.target.nbytes)
            own[number] = solve(layer, ALONE)
    shares = job.processes.gather(own, "solved layers")
    return [shares[owner][number] for number, owner in enumerate(owners)]


def solve_dealt(job: Job) -> Generator[Event, None, None]:
    """Solve, without data, all layers that are left; of a process alone this is not asked."""
    store, processes = job.store, job.processes
    left = [layer for layer in job.plan.quantized if layer.target.name not in store.rows]
    left.sort(key=lambda layer: -layer.weights)
    sizes = [layer.weights for layer in left]
    owners = deal(sizes, processes.count)
    for some in rounds(sizes, owners, processes.count, ROUND_WEIGHTS):
        own: dict[int, Solved] = {}
        mine = [number for number in some if owners[number] == processes.rank]
        for number, following in zip_longest(mine, mine[1:]):
            layer = left[number]
            for tensor in () if following is None else left[following].target.tensors:
                tensor.announce()
            yield Working(layer.target.tensor.name, layer.target.nbytes)
            own[number] = solve_without_data(job, layer)
        for share in processes.to_first(own, "layers solved without data"):
            for number, (tensors, row) in share.items():
                layer = left[number]
                yield Done(layer.target.tensor.name, layer.target.nbytes, store.put(layer, tensors, row))


def solve_without_data(job: Job, layer: LayerPlan, gradient: Gradient | None = None) -> Solved:
    """Read a layer's weight and solve it, with the loss's `gradient` where the method asks for it."""

    def solve(device: torch.device) -> Solved:
        weight = read_weight(layer, device)
        return solve_layer(job.plan, layer, weight, None, read_given(job.store, layer, weight), moved(gradient, device))

    return on_device_or_host(job, layer.target.name, solve)
