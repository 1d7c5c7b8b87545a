"""The method table: every method is one row, a choice on each axis of the solver."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from qinit.errors import RecipeError, did_you_mean

LARGE_SHARE = 1 / 4  # of a layer's weights

# The parts of `Statistics`; the gradient is one of the weight, and not of what the layer sees.
Need = Literal["hessian", "mean", "magnitude", "output metric", "fisher", "gradient"]
Factors = Literal["svd", "minor", "qr", "covariance", "covariance-minor", "inputs", "gradient"]


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
    solver: Literal["data-free", "calibrated", "published", "start"] = "data-free"
    needs: frozenset[Need] = frozenset()
    rounding: Literal["nearest", "gptq"] = "nearest"
    metric: Literal["weight", "diagonal", "activation", "kfac", "fisher"] = "weight"
    split: Literal["balanced", "A", "B"] = "balanced"  # which factor starts with the singular values
    factors: Factors | None = None  # of the solver "start": what A and B are made of, see `qinit.solver.starts`
    preserve: bool = False  # some of the rank goes to the weight itself, before the rest is quantized
    magr: bool = False  # outliers are shrunk before rounding, where the inputs allow it
    ridge: float = 0.0  # times H's mean diagonal, added to H for the low-rank fit
    refit: bool = True
    keep_best: bool = False
    relaxation: float = 1.0  # how far the target moves towards W - L each round; 1 is plain alternation
    svd: Literal["full", "subspace"] = "full"
    adapter: str = "lora"
    rslora: bool = False  # whether the scale is lora_alpha / sqrt(rank) where nobody says
    stages: tuple[str, ...] = ()  # what is done with each block after its layers are solved
    adjustable: bool = False  # whether a recipe may set its rounds, its rounding and the order of its inputs
    mixes_widths: bool = False  # whether its layers may get different widths
    passes: int = 0  # of coordinate descent over each block of columns, in every round after the codes are rounded
    act_order: bool = False

    @property
    def walks(self) -> bool:
        """Whether it looks at what the layers read, if it looks at text at all."""
        return self.needs != {"gradient"}

    @property
    def passes_back(self) -> bool:
        """Whether it looks at gradients that a pass back through one block at a time gives."""
        return not self.needs.isdisjoint({"output metric", "gradient"})

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


def _start(name: str, source: str, start: Literal["none", "low-rank"], factors: Factors, *needs: Need) -> Method:
    row = Method(name, source, "exact", "none", start, 1, solver="start", needs=frozenset(needs), refit=False)
    return replace(row, factors=factors)


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

# Starts of a full-precision weight W: the base holds W - s B A, in 16 bits, or rounded to the grid that a recipe names.
# Those that start from none leave W as it is.
STARTS = {
    row.name: row
    for row in (
        Method("lora", "Hu et al. 2021, arXiv:2106.09685", "exact", "none", "none", 1, refit=False),
        Method("rslora", "Kalajdzievski 2023, arXiv:2312.03732", "exact", "none", "none", 1, refit=False, rslora=True),
        Method("dora", "Liu et al. 2024, arXiv:2402.09353", "exact", "none", "none", 1, refit=False, adapter="dora"),
        _start("pissa", "Meng et al. 2024, arXiv:2404.02948", "low-rank", "svd"),
        _start("olora", "Buyukakyuz 2024, arXiv:2406.01775", "low-rank", "qr"),
        _start("milora", "Wang et al. 2024, arXiv:2406.09044", "low-rank", "minor"),
        _start("corda", "Yang et al. 2024, arXiv:2406.05223", "low-rank", "covariance", "hessian"),
        _start("eva", "Paischer et al. 2024, arXiv:2410.07170", "none", "inputs", "hessian", "mean"),
        _start("lora-ga", "Wang et al. 2024, arXiv:2407.05000", "low-rank", "gradient", "gradient"),
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


SEARCHES = {"int": "mse", "nf": "absmax"}  # of the grids that the base of a start may be rounded to


def on_grid(row: Method, grid: str) -> Method:
    """Return what a row of STARTS becomes where its base is rounded to a grid."""
    return replace(row, grid=grid, search=SEARCHES[grid])


def plain(row: Method) -> Method:
    """Return what a row of STARTS leaves for a layer without what it `needs`: a plain LoRA start."""
    return replace(row, solver="data-free", start="none", needs=frozenset(), factors=None)


def get_method(name: str, *, calibrated: bool = False) -> Method:
    """Look a row up by name; raises RecipeError with a suggestion for an unknown one."""
    rows = {**METHODS, **STARTS}
    if name not in rows:
        raise RecipeError(f"method: no '{name}'{did_you_mean(name, rows)}; known are {', '.join(rows)}")
    return CALIBRATED[name] if calibrated and name in CALIBRATED else rows[name]
