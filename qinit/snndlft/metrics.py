"""How good a classifier's predictions are, by GLUE's metrics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qinit.errors import RecipeError, did_you_mean

Counts = np.ndarray  # [classes, classes]: true class, predicted class


def accuracy(counts: Counts) -> float:
    return float(np.trace(counts) / counts.sum())


def f1(counts: Counts) -> float:
    """Return F1 of the second class, as GLUE has it for pairs of classes; of more classes the mean of each one's."""
    hits, both = np.diag(counts), counts.sum(0) + counts.sum(1)
    each = np.divide(2 * hits, both, out=np.zeros(len(counts)), where=both > 0)
    return float(each[1] if len(counts) == 2 else each.mean())


def matthews(counts: Counts) -> float:
    """Return Matthews' correlation, for any number of classes (Gorodkin 2004); 0 where one side is constant."""
    true, found, total = counts.sum(1), counts.sum(0), counts.sum()
    above = np.trace(counts) * total - true @ found
    below = np.sqrt(float(total**2 - found @ found) * float(total**2 - true @ true))
    return float(above / below) if below > 0 else 0.0


METRICS: dict[str, Callable[[Counts], float]] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}


def require_metric(name: str) -> None:
    """Raise RecipeError for a name that is no metric's."""
    if name not in METRICS:
        raise RecipeError(f"metric: unknown '{name}'{did_you_mean(name, METRICS)}; known are {', '.join(METRICS)}")


def measured(name: str, true: np.ndarray, found: np.ndarray, classes: int) -> float:
    """Return a metric of predicted against true classes, both [n] of numbers below `classes`."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (true, found), 1)
    return METRICS[name](counts)
