"""How long a run will take on this machine, from a measurement of at most some two seconds."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch

from qinit.calibration.output_metric import DIRECTIONS
from qinit.linalg.low_rank import OutputMetric
from qinit.machine import measured_speed
from qinit.plan.limits import AUTO_SOURCE, GRADIENT_LENGTH, GRADIENT_PASSES, GRADIENT_SAMPLES
from qinit.plan.plan import LayerPlan, Plan
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec
from qinit.solver.statistics import Statistics
from qinit.text.self_text import LARGEST_BATCH
from qinit.text.sources import sampling_cost
from qinit.train.polish import BATCH_TOKENS, polish_flops
from qinit.words import duration

EFFICIENCY = 0.3  # of a matrix product's speed that a model reaches
TOKEN_SECONDS = 4e-4  # per layer of the model and token written: what a step costs beside its arithmetic

LARGEST_SAMPLE = 1024  # rows and columns of the matrix that is solved to learn the solver's speed
INPUTS_OF_HALF = 4000  # with calibration: where a solve's matrix products, that grow with the inputs, are half of it


@dataclass(frozen=True)
class Estimate:
    """Seconds: to write or read the calibration text and measure the layers on it, to measure how sensitive they are,
    to solve them all, to polish."""

    calibrating: float
    allocating: float
    solving: float
    polishing: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def estimate(plan: Plan, device: torch.device) -> Estimate:
    """Estimate a run's time; right to a factor of two on an idle machine, disks not counted."""
    recipe, speed = plan.recipe, measured_speed(device)
    parameters = sum(tensor.numel for tensor in plan.checkpoint.tensors.values())
    spec = plan.layer_spec(plan.quantized[0])
    solving = _per_cost(spec, device) * sum(_cost(spec, *_shape(layer)) for layer in plan.quantized)
    allocating = 0.0
    if plan.pending:
        tokens = GRADIENT_SAMPLES * GRADIENT_LENGTH
        weights = sum(layer.weights for layer in plan.quantized)
        products = 2 * tokens * (GRADIENT_PASSES * parameters + len(recipe.widths) * weights)
        allocating = products / (EFFICIENCY * speed) + len(recipe.widths) * solving / spec.iterations
    calibrating = calibration_cost(plan, recipe.calibration, speed).seconds if recipe.calibrated else 0.0
    polishing = polish_flops(parameters, BATCH_TOKENS, recipe.polish_steps) / (EFFICIENCY * speed)
    return Estimate(calibrating, allocating, solving, polishing)


def _shape(layer: LayerPlan) -> tuple[int, int]:
    return layer.target.module.out_features, layer.target.module.in_features


def _cost(spec: LayerSpec, rows: int, columns: int) -> float:
    """What a solve's time is proportional to."""
    return rows * columns * (1 + columns / INPUTS_OF_HALF if spec.method.needs else 1.0)


def _per_cost(spec: LayerSpec, device: torch.device) -> float:
    """Solve a matrix of noise and return its seconds per unit of cost."""
    size = max(spec.group_size, LARGEST_SAMPLE // (4 if spec.method.svd == "full" else 1))
    seconds = 0.0
    for width in (spec.group_size, size):  # the first one only loads the kernels
        weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0)).to(device)
        inputs = torch.eye(width, device=device)
        statistics = Statistics(inputs, inputs.diagonal(), width, drift=0.01 * weight)
        if "fisher" in spec.method.needs:
            statistics = replace(statistics, fisher=weight.square())
        if "output metric" in spec.method.needs:
            statistics = replace(statistics, output_metric=OutputMetric(weight[:DIRECTIONS], inputs.diagonal()))
        started = time.perf_counter()
        solve(weight, replace(spec, rank=min(spec.rank, width)), 0, statistics)
        seconds = time.perf_counter() - started
    return seconds / _cost(spec, size, size)


@dataclass(frozen=True)
class Cost:
    """Seconds on this machine: to get the text (`writing`), to run the model over it and solve (`measuring`)."""

    writing: float
    measuring: float

    @property
    def seconds(self) -> float:
        return self.writing + self.measuring


def calibration_cost(plan: Plan, source: str, speed: float) -> Cost:
    """Estimate from headers what calibration on `source` takes at `speed` floating-point operations per second."""
    recipe = plan.recipe
    facts = plan.facts
    length = facts.clip(recipe.calibration_length)
    tokens = recipe.calibration_samples * length
    parameters = sum(tensor.numel for tensor in plan.checkpoint.tensors.values())
    weights = sum(layer.weights for layer in plan.quantized)
    products = sum(layer.target.module.in_features**2 for layer in plan.quantized)
    passes = 8 if recipe.calibration_mode == "sequential" else 2  # two models, up to each group of layers, and on
    measuring = (2 * passes * weights + 2 * products) * tokens / (EFFICIENCY * speed)
    if "output metric" in recipe.row.needs:
        measuring += 2 * GRADIENT_PASSES * parameters * GRADIENT_SAMPLES * GRADIENT_LENGTH / (EFFICIENCY * speed)
    writing = 0.0
    if source == AUTO_SOURCE:
        layers = len({layer.target.name.rsplit(".", 1)[0] for layer in plan.quantized})
        writing = sampling_cost(parameters, recipe.calibration_samples, length) / (EFFICIENCY * speed)
        writing += TOKEN_SECONDS * layers * length * -(-recipe.calibration_samples // LARGEST_BATCH)
    return Cost(writing, measuring)


def expected(plan: Plan, device: torch.device) -> tuple[str, ...]:
    """Say what calibration and polish will take on this machine, a line each; nothing for a plan without."""
    if not plan.recipe.calibrated:
        return ()
    speed = measured_speed(device)
    cost = calibration_cost(plan, plan.recipe.calibration, speed)
    writing = f", {duration(cost.writing)} of it to write the text" if cost.writing else ""
    lines = [f"calibration takes about {duration(cost.seconds)} here{writing}"]
    if plan.recipe.polish:
        lines.append(expected_polish(plan, device))
    return tuple(lines)


def expected_polish(plan: Plan, device: torch.device) -> str:
    """Say what the polish alone will take on this machine."""
    parameters, steps = sum(tensor.numel for tensor in plan.checkpoint.tensors.values()), plan.recipe.polish_steps
    seconds = polish_flops(parameters, BATCH_TOKENS, steps) / (EFFICIENCY * measured_speed(device))
    return f"{steps} steps of polish take about {duration(seconds)} here, with the whole model in memory"
