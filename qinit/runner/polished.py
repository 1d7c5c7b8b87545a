"""The polish at a run's end."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch

from qinit.events import (
    Event,
)
from qinit.linalg.low_rank import LowRank
from qinit.runner.job import Job
from qinit.runner.layer import read_weight
from qinit.solver.residual import residual_norm
from qinit.train.polish import Polished, polish
from qinit.workplace.kept import apply_polish, save_polish


def polish_adapters(job: Job) -> Generator[Event, None, None]:
    """Polish all adapters together and put them in the place of those that were fitted layer by layer."""
    if job.journal.find("polish") is None:
        yield from _polish(job)
    result, errors = apply_polish(job.store)
    job.calibration["polish"] = result
    if not result["kept"]:
        yield job.note("polish: did not lower the held-out loss, so the adapters stay as they were")
    for name, error in errors.items():
        # What the layer's output was off by was measured before; the polish trades it between layers.
        job.store.rows[name] = replace(job.store.rows[name], error=error, output_error=None)


def _polish(job: Job) -> Generator[Event, None, None]:
    """Polish, measure the weight errors anew, and keep the result."""
    plan, store = job.plan, job.store
    layers = {layer.target.name: layer for layer in plan.quantized}
    samples = yield from job.samples()
    result: Polished = yield from polish(
        plan.checkpoint.directory,
        plan.checkpoint.config,
        {name: store.quantized(layer) for name, layer in layers.items()},
        {name: store.low_rank(layer) for name, layer in layers.items()},
        samples,
        steps=plan.recipe.polish,
        device=job.device,
        seed=plan.recipe.seed,
        trust_remote_code=plan.recipe.trust_remote_code,
    )
    errors: dict[str, float] = {}
    encoded: dict[str, torch.Tensor] = {}
    for name, low_rank in result.factors.items() if result.kept else ():
        layer = layers[name]
        weight = read_weight(layer, job.device)
        residual = weight - store.quantized(layer).to(job.device)
        factors = LowRank(low_rank.B.to(job.device), low_rank.A.to(job.device))
        errors[name] = residual_norm(residual, factors) / residual_norm(weight, None)
        encoded |= plan.adapter.encode(layer.target.module, low_rank, layer.rank, plan.recipe.lora_scale, 0)
    words = {"steps": result.steps, "held_out_before": result.before, "held_out_after": result.after}
    save_polish(store, {**words, "kept": result.kept}, errors, encoded)
