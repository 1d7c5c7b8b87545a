"""Whether `--calibration auto` pays: an estimate of its time and memory, made before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qinit.calibration.self_text import LARGEST_BATCH
from qinit.calibration.sources import sampling_cost
from qinit.machine import free_memory, measured_speed
from qinit.polish import BATCH_TOKENS, polish_flops
from qinit.words import duration

if TYPE_CHECKING:
    from qinit.calibration.samples import Samples
    from qinit.plan import Plan

LONGEST = 300.0  # seconds that `auto` may spend without being asked, on a machine of nominal speed:
NOMINAL_SPEED = {"cpu": 1.5e11, "cuda": 5e13}  # so that a busy machine writes the same bytes as an idle one
EFFICIENCY = 0.3  # of a matrix product's speed that a model reaches
PASSES = 8  # forward twice and a pass back, in forward passes
GRADIENT_SAMPLES, GRADIENT_LENGTH = 16, 256  # of the text are taken back too
TOKEN_SECONDS = 4e-4  # per layer of the model and token written: what a step costs beside its arithmetic
LARGEST_SHARE = 0.5  # of the free memory that a model may take for writing its text
AUTO_SOURCE = "self"


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
    if recipe.row.metric == "kfac":
        measuring += 2 * PASSES * parameters * GRADIENT_SAMPLES * GRADIENT_LENGTH / (EFFICIENCY * speed)
    writing = 0.0
    if source == AUTO_SOURCE:
        layers = len({layer.target.name.rsplit(".", 1)[0] for layer in plan.quantized})
        writing = sampling_cost(parameters, recipe.calibration_samples, length) / (EFFICIENCY * speed)
        writing += TOKEN_SECONDS * layers * length * -(-recipe.calibration_samples // LARGEST_BATCH)
    return Cost(writing, measuring)


def choose(plan: Plan, device: torch.device) -> tuple[str, str]:
    """Decide `auto` for this plan and machine: the source (`self` or `none`) and the reason, for people."""
    if plan.recipe.row.name != "eqft":
        return "none", f"method {plan.recipe.method} takes none"
    facts = plan.facts
    if not facts.causal or facts.start is None:
        return "none", "the model writes no text of its own; give --calibration FILE to start closer"
    free = free_memory(device)
    if plan.bytes_before > LARGEST_SHARE * free:
        return "none", (
            f"writing its own text takes {plan.bytes_before / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free; "
            "give --calibration FILE to start closer"
        )
    nominal = calibration_cost(plan, AUTO_SOURCE, NOMINAL_SPEED[device.type]).seconds
    if nominal > LONGEST:
        here = duration(calibration_cost(plan, AUTO_SOURCE, measured_speed(device)).seconds)
        return "none", (
            f"on the model's own text it would take about {here} here; give --calibration self to have it all the "
            "same, or a file"
        )
    return AUTO_SOURCE, "on text that the model writes itself"


def expected(plan: Plan, device: torch.device) -> tuple[str, ...]:
    """Say what calibration and polish will take on this machine, a line each; nothing for a plan without."""
    if not plan.recipe.calibrated:
        return ()
    speed = measured_speed(device)
    cost = calibration_cost(plan, plan.recipe.calibration, speed)
    writing = f", {duration(cost.writing)} of it to write the text" if cost.writing else ""
    lines = [f"calibration takes about {duration(cost.seconds)} here{writing}"]
    if plan.recipe.polish:
        parameters = sum(tensor.numel for tensor in plan.checkpoint.tensors.values())
        seconds = polish_flops(parameters, BATCH_TOKENS, plan.recipe.polish) / (EFFICIENCY * speed)
        lines.append(
            f"{plan.recipe.polish} steps of polish take about {duration(seconds)} here, with the whole model in memory"
        )
    return tuple(lines)


def text_for(plan: Plan, device: torch.device, token: str | None) -> Samples:
    """Read or write the text that the recipe asks for; without calibration a little of the model's own, to allocate
    widths by, or random tokens where it writes none. Raises CalibrationError and HubError."""
    from qinit.calibration.sources import load_samples

    recipe, checkpoint = plan.recipe, plan.checkpoint
    source, count, length = recipe.calibration, recipe.calibration_samples, recipe.calibration_length
    if not recipe.calibrated:
        facts = plan.facts
        writes = facts.causal and facts.start is not None and plan.bytes_before <= LARGEST_SHARE * free_memory(device)
        source, count, length = "self" if writes else "random", GRADIENT_SAMPLES, GRADIENT_LENGTH
    return load_samples(
        source,
        checkpoint.directory,
        checkpoint.config,
        samples=count,
        length=length,
        seed=recipe.seed,
        text_field=recipe.text_field,
        token=token,
        device=device,
        trust_remote_code=recipe.trust_remote_code,
    )
