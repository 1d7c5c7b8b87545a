"""What a comparison has left to do, and how long that will take here, from one step that is measured."""

from __future__ import annotations

import time
from typing import Any

import torch

from qinit.compare.comparison import CEILINGS, LORA, Cell, Comparison, Row
from qinit.compare.measure import load_start
from qinit.compare.schedule import Schedule, best_rate
from qinit.evaluate.figures import perplexity
from qinit.machine import pick_device
from qinit.planner.operations import Machine
from qinit.planner.time import estimate
from qinit.train.finetune import Training, finetune
from qinit.words import duration

BACKWARD = 3.0  # a training step costs so many forward passes


def forecast(schedule: Schedule, jobs: int) -> dict[str, Any]:
    """Return every cell with whether it is done, the seconds of one step, and of all that is left.

    Loads the model and takes two steps of 16-bit LoRA; what else goes on here just now slows that down as it does
    the rest.
    """
    comparison = schedule.comparison
    cells = [cell for row in comparison.rows for cell in _cells(comparison, row, schedule)]
    left = [cell for cell in cells if cell not in schedule.found]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))
    try:
        step, token = _measured(comparison) if left else (0.0, 0.0)
        tokens = sum(len(text.ids) for text in comparison.texts)
        seconds, machine = 0.0, Machine(pick_device(comparison.device))
        for cell in left:
            seconds += token * tokens
            if cell.rate is not None and comparison.training and comparison.validation:
                seconds += step * comparison.training.steps + token * len(comparison.validation.ids)
            elif cell.row.recipe is not None and cell.row.run is None:
                plan = comparison.plan(cell.row.recipe)
                seconds += estimate(plan, machine.device, machine).total
    finally:
        torch.set_num_threads(threads)
    seconds /= min(jobs, max(1, len(left)))
    return {
        "cells": [{"cell": cell.name, "done": cell in schedule.found} for cell in cells],
        "left": len(left),
        "seconds_per_step": step or None,
        "seconds": seconds,
        "words": f"about {duration(seconds)}" if left else "nothing left to do",
    }


def _cells(comparison: Comparison, row: Row, schedule: Schedule) -> list[Cell]:
    """Return a row's cells; where the best rate is not known yet, its repeats stand at the first one."""
    best = best_rate(comparison, row, schedule.found)
    done = all(cell in schedule.found for cell in comparison.sweep(row))
    rate = best if done and best is not None else row.rates[0] if row.rates else 0.0
    repeats = comparison.repeats(row, rate) if comparison.training else []
    return [Cell(row), *comparison.sweep(row), *repeats]


def _measured(comparison: Comparison) -> tuple[float, float]:
    """Return the seconds of a training step and of a token in a forward pass."""
    training = comparison.training
    ceiling = next((row for row in comparison.rows if row.method in CEILINGS), Row(LORA, 16, None, (), 16.0))
    model = load_start(comparison, ceiling if training is None else Row(LORA, 16, None, (), 16.0), 0)
    seconds = []
    if training is None or comparison.learn is None:
        tokens = comparison.texts[0].tokens[: comparison.window]
        for _ in range(2):
            started = time.perf_counter()
            perplexity(model, tokens, comparison.window)
            seconds.append(time.perf_counter() - started)
        return 0.0, seconds[-1] / len(tokens)
    one = Training(**{**vars(training), "steps": 1})
    for _ in range(3):
        started = time.perf_counter()
        finetune(model, comparison.learn.tokens, one, rate=1e-6, seed=0)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]), min(seconds[1:]) / (BACKWARD * training.batch * training.length)
