"""How long operations take on this machine, just now: measured on the shapes of a model, or on a part of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from qinit.calibration.output_metric import DIRECTIONS, STEPS
from qinit.linalg.hessian import add_second_moment
from qinit.linalg.low_rank import OutputMetric
from qinit.solver.solve import solve
from qinit.solver.spec import Gradient, LayerSpec
from qinit.solver.statistics import Statistics

LEAST_SECONDS = 0.02  # that an operation is repeated for: less than one turn of a busy neighbour says nothing
MOST_SECONDS = 1.5  # in all; after that an operation's other shapes are scaled, and what is new is measured once
MOST_SHAPES = 6  # of one operation that are measured; a model has four shapes or five, and a head
# Multiply-adds and numbers that one call has at most: 20 ms and less on a core or two, enough to fill a GPU.
LARGEST = {"cpu": 1 << 29, "cuda": 1 << 35}
LARGEST_MATRIX = {"cpu": 1 << 23, "cuda": 1 << 26}  # and the weights in it: more than a cache holds
LARGEST_VECTOR = {"cpu": 1 << 22, "cuda": 1 << 26}
ROWS = 512  # of a product: more are no faster
WIDEST = 4096  # inputs of a product
SOLVED, SOLVED_BY_SVD = 1 << 18, 1 << 16  # weights of the matrix that is solved; twice the first without data
ROUNDS_BY_SVD = 3  # all alike, so that more need not be seen
INPUTS_OF_HALF = 4000  # with calibration: where a solve's matrix products, that grow with the inputs, are half of it

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """`make` returns an action on a shape and a device; `cut` the shape that is measured in its place, on a kind of
    device; the time is in proportion to `cost` of a shape."""

    make: Callable[[Shape, torch.device], Callable[[], Any]]
    cut: Callable[[Shape, str], Shape]
    cost: Callable[[Shape], float] = math.prod


def _product(shape: Shape, device: torch.device) -> Callable[[], Any]:
    rows, inputs, outputs = shape
    x, weight = torch.ones(rows, inputs, device=device), torch.ones(outputs, inputs, device=device)
    return lambda: functional.linear(x, weight)


def _cut_product(shape: Shape, kind: str) -> Shape:
    rows, inputs = min(shape[0], ROWS), min(shape[1], WIDEST)
    most = min(LARGEST[kind] // (rows * inputs), LARGEST_MATRIX[kind] // inputs)
    return rows, inputs, min(shape[2], max(1, most))


def _attention(shape: Shape, device: torch.device) -> Callable[[], Any]:
    q = torch.ones(1, *shape, device=device)
    return lambda: functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def _cut_attention(shape: Shape, kind: str) -> Shape:
    heads, length, width = shape[0], min(shape[1], 2 * ROWS), shape[2]
    return min(heads, max(1, LARGEST[kind] // (2 * length * length * width))), length, width


def _recall(shape: Shape, device: torch.device) -> Callable[[], Any]:
    """A token's attention to those before it, as transformers has it: the cache of keys and values grows by a copy."""
    batch, heads, shared, length, width = shape
    q = torch.ones(batch, shared, max(1, heads // shared), width, device=device)
    new = torch.ones(batch, shared, 1, width, device=device)
    cache = torch.ones(batch, shared, length, width, device=device)

    def step() -> torch.Tensor:
        keys, values = (torch.cat([cache, new], dim=-2) for _ in range(2))
        return functional.scaled_dot_product_attention(q, keys, values)

    return step


def _cut_recall(shape: Shape, kind: str) -> Shape:
    batch, heads, shared, length, width = shape
    length = min(length, 2 * ROWS)
    return min(batch, max(1, LARGEST_VECTOR[kind] // (heads * length * width))), heads, shared, length, width


def _draw(shape: Shape, device: torch.device) -> Callable[[], Any]:
    logits = torch.zeros(shape, device=device)
    return lambda: torch.multinomial(logits.softmax(-1), 1)


def _moment(shape: Shape, device: torch.device) -> Callable[[], Any]:
    rows, width = shape
    x, moment = torch.ones(rows, width, device=device), torch.zeros(width, width, device=device)
    return lambda: add_second_moment(moment, x, 0.5, 0.5 / rows)


def _directions(shape: Shape, device: torch.device) -> Callable[[], Any]:
    rows = torch.rand(shape, device=device)

    def steps() -> torch.Tensor:
        basis = rows[:DIRECTIONS].T
        for _ in range(STEPS):
            basis = rows.T @ torch.linalg.qr(rows @ basis).Q
        return basis

    return steps


def _small(_shape: Shape, device: torch.device) -> Callable[[], Any]:
    x = torch.ones(64, device=device)
    return lambda: [x * 0.5 for _ in range(100)]


def _pass(shape: Shape, device: torch.device) -> Callable[[], Any]:
    x = torch.ones(shape, device=device)
    return lambda: x * x


def _exponential(shape: Shape, device: torch.device) -> Callable[[], Any]:
    x = torch.ones(shape, device=device)
    return lambda: x.exp()


def _cut_last(shape: Shape, kind: str) -> Shape:
    """Cut rows, and then what is in them."""
    *_, rows, width = (1, *shape)
    width = min(width, LARGEST_VECTOR[kind])
    return (min(rows, max(1, LARGEST_VECTOR[kind] // width)), width)[-len(shape) :]


OPERATIONS = {
    "product": Operation(_product, _cut_product),  # rows, inputs, outputs
    "step": Operation(_product, _cut_product),  # the same, of one token for each text that is written
    "attention": Operation(_attention, _cut_attention, lambda shape: math.prod(shape) * shape[1]),  # heads, length, dim
    "recall": Operation(_recall, _cut_recall),  # batch, heads, heads of the cache, length, dim
    "draw": Operation(_draw, _cut_last),  # batch, vocabulary
    "moment": Operation(  # rows, inputs
        _moment,
        lambda shape, _kind: (min(shape[0], ROWS), min(shape[1], 2 * ROWS)),
        lambda shape: math.prod(shape) * shape[1],
    ),
    "directions": Operation(_directions, lambda shape, _kind: (shape[0], min(shape[1], 2 * ROWS))),  # rows, outputs
    "pass": Operation(_pass, _cut_last),  # numbers that are read and written once
    "exponential": Operation(_exponential, _cut_last),  # the same, with a function of each
    "small": Operation(_small, lambda shape, _kind: (100,)),  # calls that have next to nothing to do
}


@dataclass
class _Measured:
    """What is known of an operation on a shape: `action` can be made again, `weight` is what it takes of all runs that
    were asked about."""

    make: Callable[[], Callable[[], Any]]
    seconds: float = 0.0
    times: int = 0
    weight: float = 0.0


class Machine:
    """Measures operations on a device: each shape once, and those that most of a run is made of again."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent = device, 0.0
        self.known: dict[Any, dict[Shape, _Measured]] = {}

    def seconds(self, name: str, shape: Shape, count: float = 1.0) -> float:
        """Return what `count` calls take."""
        operation = OPERATIONS[name]
        cut = operation.cut(shape, self.device.type)
        count *= operation.cost(shape) / operation.cost(cut)
        return self._seconds(name, cut, count, operation.cost, lambda: operation.make(cut, self.device))

    def solving(self, spec: LayerSpec, rows: int, columns: int, count: float = 1.0) -> float:
        """Return what it takes to solve `count` matrices of noise, with all statistics that the method needs."""
        full = spec.method.svd == "full"
        most = SOLVED_BY_SVD if full else SOLVED if spec.method.needs else 2 * SOLVED
        cut = _cut_solve(rows, columns, spec.group_size, most)
        iterations = min(spec.iterations, ROUNDS_BY_SVD) if full else spec.iterations
        some = replace(spec, rank=min(spec.rank, *cut), iterations=iterations)

        def cost(shape: Shape) -> float:
            return _solve_cost(spec, shape)

        count *= cost((rows, columns)) / cost(cut) * spec.iterations / iterations
        return self._seconds(some, cut, count, cost, lambda: _solve(some, cut, self.device))

    def sharpen(self) -> None:
        """Measure again what takes the most, until MOST_SECONDS are spent: a neighbour disturbs some, not all alike."""
        found = [measured for shapes in self.known.values() for measured in shapes.values()]
        while found and self.spent < MOST_SECONDS:
            self._measure(max(found, key=lambda measured: measured.weight / measured.times))

    def _seconds(
        self,
        what: Any,
        shape: Shape,
        count: float,
        cost: Callable[[Shape], float],
        make: Callable[[], Callable[[], Any]],
    ) -> float:
        """Return what `count` calls take; where enough was measured, by the nearest shape that is known."""
        known = self.known.setdefault(what, {})
        if shape not in known and known and (len(known) >= MOST_SHAPES or self.spent > MOST_SECONDS):
            wanted = cost(shape)
            shape = min(known, key=lambda other: abs(math.log(cost(other) / wanted)))
            count *= wanted / cost(shape)
        if shape not in known:
            known[shape] = _Measured(make)
            self._measure(known[shape])
        measured = known[shape]
        seconds = count * measured.seconds / measured.times
        measured.weight += seconds
        return seconds

    def _measure(self, measured: _Measured) -> None:
        started = time.perf_counter()
        with torch.no_grad():
            measured.seconds += timed(measured.make(), self.device)
        measured.times += 1
        self.spent += time.perf_counter() - started


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call: the mean over LEAST_SECONDS, after one that does not count. The mean, and not the
    best: what a busy neighbour takes, it will take from the run too."""

    def call() -> None:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    calls, started = 0, time.perf_counter()
    while not calls or time.perf_counter() - started < LEAST_SECONDS:
        call()
        calls += 1
    return (time.perf_counter() - started) / calls


def _cut_solve(rows: int, columns: int, group_size: int, most: int) -> Shape:
    """Cut a matrix to `most` weights, in its own proportions, in whole groups."""
    if rows * columns <= most:
        return rows, columns
    share = math.sqrt(most / (rows * columns))
    columns = max(group_size, int(columns * share) // group_size * group_size)
    return max(1, min(rows, most // columns)), columns


def _solve_cost(spec: LayerSpec, shape: Shape) -> float:
    """What a solve's time is in proportion to."""
    if spec.method.svd == "full":
        return math.prod(shape) * min(shape)
    return calibrated_cost(shape) if spec.method.needs else math.prod(shape)


def calibrated_cost(shape: Shape) -> float:
    """Return what a calibrated solve's time is in proportion to, where no full SVD is a part of it."""
    rows, columns = shape
    return rows * columns * (1 + columns / INPUTS_OF_HALF)


def _solve(spec: LayerSpec, shape: Shape, device: torch.device) -> Callable[[], Any]:
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator).to(device)
    inputs = torch.eye(columns, device=device)
    statistics = Statistics(inputs, inputs.diagonal(), columns, drift=0.01 * weight, mean=torch.zeros_like(inputs[0]))
    if "fisher" in spec.method.needs:
        statistics = replace(statistics, fisher=weight.square())
    if "output metric" in spec.method.needs:
        leading = torch.randn(min(DIRECTIONS, rows), rows, generator=generator).to(device)
        statistics = replace(statistics, output_metric=OutputMetric(leading, torch.ones(rows, device=device)))
    if "gradient" in spec.method.needs:
        spec = replace(spec, gradient=Gradient(*torch.linalg.svd(weight, full_matrices=False)))
    return lambda: solve(weight, spec, 0, statistics)
