"""Kinds of devices that need not be here: how fast one is, as `benchmarks/gpu.py` has measured it.

Each file in `kinds/` is that script's result, as it was written; a newer one takes its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qinit.calibration.output_metric import DIRECTIONS, STEPS
from qinit.errors import RecipeError, did_you_mean
from qinit.machine import Card
from qinit.plan.plan import Plan
from qinit.planner.operations import Shape, calibrated_cost
from qinit.planner.work import DISK_SPEED, reads
from qinit.solver.spec import LayerSpec
from qinit.text.self_text import LARGEST_BATCH

PLACE = Path(__file__).parent / "kinds"
# What the script measures: layers of a block, what lies outside of blocks, blocks, and the text that a model writes.
BLOCK = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
OUTSIDE_BYTES = 2 * 2 * 128256 * 4096
BLOCKS, SAMPLES, LENGTH = 4, 128, 512
CALL = "us of a small call"
FORWARD = "TFLOP/s forward, of a block's matrix products"
NUMBER = 4  # bytes
# Floating-point operations and bytes of one call on a shape.
COSTS: dict[str, Callable[[Shape], tuple[float, float]]] = {
    "product": lambda s: (2 * math.prod(s), NUMBER * (s[0] * s[1] + s[1] * s[2] + s[0] * s[2])),
    "step": lambda s: (0, 0),  # what a step of writing takes is counted by its recalls
    "attention": lambda s: (2 * math.prod(s) * s[1], 4 * NUMBER * math.prod(s)),  # what lies ahead is left out
    "recall": lambda s: (
        4 * s[0] * s[1] * s[3] * s[4],
        6 * NUMBER * s[0] * s[2] * s[3] * s[4],
    ),  # two caches are copied
    "draw": lambda s: (0, 6 * NUMBER * math.prod(s)),
    "moment": lambda s: (2 * math.prod(s) * s[1], NUMBER * (math.prod(s) + 2 * s[1] ** 2)),
    "directions": lambda s: (4 * STEPS * DIRECTIONS * math.prod(s), 2 * STEPS * NUMBER * math.prod(s)),
    "pass": lambda s: (0, 2 * NUMBER * math.prod(s)),
    "exponential": lambda s: (0, 2 * NUMBER * math.prod(s)),
    "small": lambda s: (0, 0),
}


def known() -> list[str]:
    """Return the names of the kinds that were measured."""
    return sorted(file.stem for file in PLACE.glob("*.json"))


def load_kind(name: str) -> Kind:
    """Return a kind that was measured; raises RecipeError for another."""
    if name not in known():
        names = ["cpu", *known()]
        raise RecipeError(f"device_kind: no '{name}'{did_you_mean(name, names)}; known are {', '.join(names)}")
    return Kind(json.loads((PLACE / f"{name}.json").read_text(encoding="utf-8")))


class Kind:
    """A device by what was measured on it; it answers what `operations.Machine` answers of one that is here."""

    def __init__(self, measured: dict[str, Any]) -> None:
        card = measured["card"]
        self.device = torch.device(measured["device"])
        self.card = Card(card["name"], self.device.type, round(card["memory, GB"] * 1e9))
        self._flops = 1e12 * card["TFLOP/s float32"]
        self._products = 1e12 * measured["calibrated"][FORWARD]  # with what else a pass forward does
        self._bytes = 1e9 * card["GB/s copied"]
        self._call = 1e-6 * card.get(CALL, 0.0)
        half, each = f"{BLOCKS // 2} blocks", "a block more"
        steps = -(-SAMPLES // LARGEST_BATCH[self.device.type]) * (LENGTH - 1)
        text, run = measured["own text"], measured["without data"]
        self._steps = {"recall": text[each] / steps, "draw": max(0.0, text[half] - BLOCKS // 2 * text[each]) / steps}
        layers = {shape: measured["layers"][" x ".join(map(str, shape))] for shape in BLOCK}
        # A layer takes some time whatever its size, and in proportion to what there is to compute.
        slope, fixed = np.polyfit([math.prod(shape) for shape in layers], list(layers.values()), 1)
        self._slopes, self._fixed = {False: float(slope)}, max(0.0, float(fixed))
        costs = sum(count * calibrated_cost(shape) for shape, count in BLOCK.items())
        solving = measured["calibrated"]["split"]["solving"] / BLOCKS - self._fixed * sum(BLOCK.values())
        self._slopes[True] = max(0.0, solving) / costs
        weights = sum(count * math.prod(shape) for shape, count in BLOCK.items())
        # To read, pack and write: a weight of a layer, and a byte of what is copied, the start of a run included.
        self._beside = max(0.0, run[each] - sum(count * layers[shape] for shape, count in BLOCK.items())) / weights
        self._outside = max(0.0, run[half] - BLOCKS // 2 * run[each]) / OUTSIDE_BYTES

    def seconds(self, name: str, shape: Shape, count: float = 1.0) -> float:
        """Return what `count` calls take: by arithmetic or by bandwidth, whichever is more; a step of writing text what
        it took, for each block and around all of them."""
        if name == "small":
            return count * math.prod(shape) * self._call
        operations, moved = COSTS[name](shape)
        rate = self._products if name == "product" else self._flops
        return count * max(operations / rate, moved / self._bytes, self._steps.get(name, 0.0))

    def solving(self, spec: LayerSpec, rows: int, columns: int, count: float = 1.0) -> float:
        """Return what it takes to solve `count` matrices with EQFT, whatever the method is."""
        calibrated = bool(spec.method.needs)
        cost = calibrated_cost((rows, columns)) if calibrated else rows * columns
        return count * spec.iterations / spec.method.iterations * (self._fixed + self._slopes[calibrated] * cost)

    def sharpen(self) -> None:
        """Nothing is measured here."""

    def files(self, plan: Plan) -> float:
        """Return what it takes to read the source and to pack, hash and write what is made of it."""
        copied = sum(tensor.nbytes for tensor in plan.untouched)
        again = (reads(plan) - 1) * plan.bytes_before / DISK_SPEED
        return self._beside * sum(layer.weights for layer in plan.quantized) + self._outside * copied + again
