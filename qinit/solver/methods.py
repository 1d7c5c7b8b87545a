"""The method table: every method is one row, a choice on each axis of the solver."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from qinit.errors import RecipeError, did_you_mean

LARGE_SHARE = 1 / 4  # of a layer's weights

Need = Literal["hessian", "magnitude", "output metric", "fisher"]  # the parts of `Statistics`


@dataclass(frozen=True)
class Method:
    """One row. `solver` carries it out, and looks at no statistics but those that it `needs`: none at all, or the
    Hessian, under which errors are measured, and more. `start` is what is fitted first; `refit` whether the low rank is
    fitted again to W - Q; `metric` the norm that it is fitted in."""

    name: str
    source: str
    grid: str
    search: str
    start: Literal["none", "quantize", "low-rank", "either"]  # "none": a plain LoRA start; "either": low_rank_first
    iterations: int
    solver: Literal["data-free", "calibrated", "published"] = "data-free"
    needs: frozenset[Need] = frozenset()
    rounding: Literal["nearest", "gptq"] = "nearest"
    metric: Literal["weight", "diagonal", "activation", "kfac", "fisher"] = "weight"
    split: Literal["balanced", "A", "B"] = "balanced"  # which factor starts with the singular values
    preserve: bool = False  # some of the rank goes to the weight itself, before the rest is quantized
    magr: bool = False  # outliers are shrunk before rounding, where the inputs allow it
    ridge: float = 0.0  # times H's mean diagonal, added to H for the low-rank fit
    refit: bool = True
    keep_best: bool = False
    relaxation: float = 1.0  # how far the target moves towards W - L each round; 1 is plain alternation
    svd: Literal["full", "subspace"] = "full"
    adapter: str = "lora"
    stages: tuple[str, ...] = ()  # what is done with each block after its layers are solved
    adjustable: bool = False  # whether a recipe may set its rounds, its rounding and the order of its inputs
    mixes_widths: bool = False  # whether its layers may get different widths
    passes: int = 0  # of coordinate descent over each block of columns, in every round after the codes are rounded
    act_order: bool = False

    def low_rank_first(self, bits: int, rank: int, shape: tuple[int, ...]) -> bool:
        """Whether a layer of `shape` (out, in) starts from the low rank of W itself, or else from that of W - Q.

        The first starts closer where codes are few, but puts the largest part of the weights into the adapter, where
        training disturbs it: it wants a rate three times lower and ends higher. So of rows that leave it open, those
        layers get it whose A and B hold a large share of the numbers that W does, and all at 2 bits without
        calibration (docs/method.md).
        """
        if self.start != "either":
            return self.start == "low-rank"
        return rank * sum(shape) >= LARGE_SHARE * math.prod(shape) or (bits == 2 and not self.needs)


METHODS = {
    row.name: row
    for row in (
        Method("qlora", "Dettmers et al. 2023, arXiv:2305.14314", "nf", "absmax", "none", 1, refit=False),
        Method("loftq", "Li et al. 2023, arXiv:2310.08659", "nf", "absmax", "quantize", 5),
        Method("qpissa", "Meng et al. 2024, arXiv:2404.02948", "nf", "absmax", "low-rank", 1, refit=False),
        Method(
            *("lqer", "Zhang et al. 2024 (L2QER), arXiv:2402.02446", "int", "minmax", "quantize", 1),
            solver="published",
            needs=frozenset({"hessian", "magnitude"}),
            metric="diagonal",
            split="B",
        ),
        Method(
            *("qera", "Zhang et al. 2024 (QERA-exact), arXiv:2410.06040", "int", "minmax", "quantize", 1),
            solver="published",
            needs=frozenset({"hessian"}),
            metric="activation",
            split="B",
        ),
        Method(
            *("eora", "Liu et al. 2024, arXiv:2410.21271", "int", "minmax", "quantize", 1),
            solver="published",
            needs=frozenset({"hessian"}),
            rounding="gptq",
            metric="activation",
        ),
        Method(
            *("cloq", "Deng et al. 2025, arXiv:2501.18475", "int", "minmax", "quantize", 1),
            solver="published",
            needs=frozenset({"hessian"}),
            rounding="gptq",
            metric="activation",
            split="A",
            magr=True,
            ridge=0.01,
        ),
        Method(
            *("srr", "Cho et al. 2026, arXiv:2602.02001", "int", "minmax", "quantize", 1),
            solver="published",
            needs=frozenset({"hessian"}),
            metric="activation",
            split="B",
            preserve=True,
        ),
        Method(
            *("lq-lora", "Guo et al. 2023, arXiv:2311.12023", "nf", "absmax", "low-rank", 100),
            solver="published",
            needs=frozenset({"hessian", "fisher"}),
            metric="fisher",
        ),
        Method(
            *("eqft", "qinit", "int", "mse", "either", 5),
            keep_best=True,
            relaxation=2.0,
            svd="subspace",
            adjustable=True,
            mixes_widths=True,
        ),
    )
}
# What a row becomes when there is calibration.
CALIBRATED = {
    "eqft": Method(
        *("eqft", "qinit", "int", "mse", "either", 3),
        solver="calibrated",
        needs=frozenset({"hessian", "output metric"}),
        rounding="gptq",
        metric="kfac",
        passes=2,
        svd="subspace",
        adjustable=True,
        mixes_widths=True,
    )
}
UNREACHED = METHODS["eqft"]  # for layers that the text of a calibrated run never reaches


def on_base(row: Method) -> Method | None:
    """Return what a row becomes where Q is that of a base that exists: what it fits to W - Q is left of it. None for a
    row that chooses Q and the low rank together."""
    if row.start == "low-rank" or row.preserve:
        return None
    rounds = 2 if row.solver == "calibrated" else 1  # the second starts from where the first has come to
    start: Literal["none", "quantize"] = "none" if row.start == "none" else "quantize"
    method = replace(row, grid="exact", search="none", start=start, rounding="nearest", iterations=rounds, stages=())
    return replace(method, magr=False, adjustable=False, mixes_widths=False, passes=0, act_order=False)


def get_method(name: str, *, calibrated: bool = False) -> Method:
    """Look a row up by name; raises RecipeError with a suggestion for an unknown one."""
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise RecipeError(f"method: no '{name}'{did_you_mean(name, METHODS)}; known are {known}")
    return CALIBRATED[name] if calibrated and name in CALIBRATED else METHODS[name]
