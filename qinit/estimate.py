"""How long a run will take on this machine, from a measurement of at most some two seconds."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch

from qinit.calibration.choice import EFFICIENCY, GRADIENT_LENGTH, GRADIENT_SAMPLES, PASSES, calibration_cost
from qinit.calibration.outputs import DIRECTIONS
from qinit.linalg.low_rank import OutputMetric
from qinit.machine import measured_speed
from qinit.plan import LayerPlan, Plan
from qinit.polish import BATCH_TOKENS, polish_flops
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec
from qinit.solver.statistics import Statistics

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
        products = 2 * tokens * (PASSES * parameters + len(recipe.widths) * weights)
        allocating = products / (EFFICIENCY * speed) + len(recipe.widths) * solving / spec.iterations
    calibrating = calibration_cost(plan, recipe.calibration, speed).seconds if recipe.calibrated else 0.0
    polishing = polish_flops(parameters, BATCH_TOKENS, recipe.polish) / (EFFICIENCY * speed)
    return Estimate(calibrating, allocating, solving, polishing)


def _shape(layer: LayerPlan) -> tuple[int, int]:
    return layer.target.module.out_features, layer.target.module.in_features


def _cost(spec: LayerSpec, rows: int, columns: int) -> float:
    """What a solve's time is proportional to."""
    return rows * columns * (1.0 if spec.method.metric == "weight" else 1 + columns / INPUTS_OF_HALF)


def _per_cost(spec: LayerSpec, device: torch.device) -> float:
    """Solve a matrix of noise and return its seconds per unit of cost."""
    size = max(spec.group_size, LARGEST_SAMPLE // (4 if spec.method.iterations_fixed else 1))  # peers use a full SVD
    seconds = 0.0
    for width in (spec.group_size, size):  # the first one only loads the kernels
        weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0)).to(device)
        inputs = torch.eye(width, device=device)
        statistics = Statistics(inputs, inputs.diagonal(), width, drift=0.01 * weight)
        if spec.method.metric == "fisher":
            statistics = replace(statistics, fisher=weight.square())
        if spec.method.metric == "kfac":
            statistics = replace(statistics, outputs=OutputMetric(weight[:DIRECTIONS], inputs.diagonal()))
        started = time.perf_counter()
        solve(weight, replace(spec, rank=min(spec.rank, width)), 0, statistics)
        seconds = time.perf_counter() - started
    return seconds / _cost(spec, size, size)
