"""Tiny models that predict with some certainty, runs made from them, and evaluating those to the end."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qinit.evaluate.figures import Figures
from qinit.evaluate.job import Evaluated, choose_way, evaluate
from qinit.evaluate.subject import Subject, find_subject
from qinit.evaluate.windows import Windows, cut_windows
from qinit.formats import FORMATS
from qinit.plan.parts import LayerPlan
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner.run import run
from tests.models import add_tokenizer, make_checkpoint, words

CPU = torch.device("cpu")
SPREAD = {"opt": "init_std"}  # what the family calls it
TOKENS = torch.randint(4, 256, (203,), generator=torch.Generator().manual_seed(3))
TEXT = words(*TOKENS.tolist())


def make_source(directory: Path, family: str = "llama", dtype: str = "float32", **options: Any) -> Path:
    """Save a tiny model whose logits are large enough to tell two of them apart, with the word tokenizer."""
    spread = {SPREAD.get(family, "initializer_range"): 0.2}
    return add_tokenizer(make_checkpoint(directory, family, dtype, **{**spread, **options}))


def make_run(
    source: Path, out: Path, *, widths: tuple[int, ...] = (2,), ranks: tuple[int, ...] = (4,), **options: Any
) -> Path:
    """Run qinit on a checkpoint; the quantized layers take these widths and ranks in turn."""
    options = {
        "rank": 4,
        "iter": 1,
        "group_size": 32,
        "calibration": "none",
        "check": False,
        "device": "cpu",
        **options,
    }
    plan = make_plan(make_recipe(model=str(source), **options), source, source.name)
    turns = zip(itertools.cycle(widths), itertools.cycle(ranks), strict=False)

    def changed(layer: LayerPlan) -> LayerPlan:
        bits, rank = next(turns)
        if layer.kept is not None:
            return replace(layer, rank=rank)
        specs = tuple(FORMATS[plan.recipe.format].specs(layer.target, bits, layer.group_size))
        return replace(layer, bits=bits, rank=rank, specs=specs)

    list(run(replace(plan, layers=tuple(map(changed, plan.layers))), out))
    return out


def subject(directory: Path | str) -> Subject:
    return find_subject(str(directory), None, None)


def figures(
    model: Subject, reference: Subject | None = None, windows: Windows | None = None, **options: Any
) -> Figures:
    """Evaluate on TOKENS and return the figures."""
    windows = cut_windows(TOKENS, 25) if windows is None else windows
    way = choose_way(model, reference, windows, CPU, **options)
    *_, last = evaluate(model, reference, windows, way, CPU)
    assert isinstance(last, Evaluated)
    assert last.figures is not None
    return last.figures
