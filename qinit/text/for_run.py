"""The text that a run reads or writes."""

from __future__ import annotations

import torch

from qinit.machine import free_memory
from qinit.plan.limits import GRADIENT_LENGTH, GRADIENT_SAMPLES, LARGEST_SHARE
from qinit.plan.plan import Plan
from qinit.processes.group import ALONE, Processes
from qinit.recipe import RANDOM, SELF
from qinit.text.samples import Portion, Samples
from qinit.text.self_text import model_bytes
from qinit.text.sources import load_samples


def text_for(
    plan: Plan, device: torch.device, token: str | None, processes: Processes = ALONE, portion: Portion = int
) -> Samples:
    """Read or write the text that the recipe asks for; without calibration a little of the model's own, to allocate
    widths by, or random tokens where it writes none; a `portion` is written at once.

    Raises CalibrationError and HubError.
    """
    recipe, checkpoint = plan.recipe, plan.checkpoint
    source, count, length = recipe.calibration, recipe.calibration_samples, recipe.calibration_length
    if not recipe.calibrated:
        facts, needed = plan.facts, model_bytes(plan.bytes_before, device)
        writes = facts.writes and needed <= LARGEST_SHARE * free_memory(device)
        source = processes.from_first(lambda: SELF if writes else RANDOM, "where text comes from")
        count, length = GRADIENT_SAMPLES, GRADIENT_LENGTH
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
        processes=processes,
        portion=portion,
    )


def polish_text(
    plan: Plan,
    seen: Samples,
    tokens: int,
    device: torch.device,
    token: str | None,
    processes: Processes = ALONE,
    portion: Portion = int,
) -> Samples:
    """Return text for a polish, `tokens` of it or as many as there are: what calibration has `seen`, with more of the
    same source (windows of a file or a data set, random tokens, or what the model writes) or of the text that qinit
    brings. Raises CalibrationError and HubError."""
    recipe, checkpoint, source = plan.recipe, plan.checkpoint, plan.polish_source
    count, length = seen.tokens.shape
    missing = -(-tokens // length) - count
    if missing <= 0 or not plan.facts.causal:
        return seen
    own = recipe.calibration == SELF
    found = load_samples(
        source,
        checkpoint.directory,
        checkpoint.config,
        samples=missing if own else count + missing,
        length=length,
        seed=recipe.seed + (source == SELF),  # what is written already is not written again
        text_field=recipe.text_field,
        token=token,
        device=device,
        trust_remote_code=recipe.trust_remote_code,
        processes=processes,
        portion=portion,
    )
    if own:
        return Samples(torch.cat([seen.tokens, found.tokens]), None, f"{seen.origin}; and {found.origin}")
    return found if len(found.tokens) > count else seen
