"""What is compared: the rows of the table, and the cells that each of them needs, every one with its digest."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from qinit.compare.texts import Text
from qinit.machine import versions
from qinit.plan.plan import Plan
from qinit.planner.make import make_plan
from qinit.recipe import Recipe
from qinit.solver.methods import get_method
from qinit.source.checkpoint import Checkpoint
from qinit.train.finetune import Training

LORA, FULL = "lora", "full"  # the ceilings: PEFT's own start on the full-precision model, and all of its parameters
CEILINGS = (LORA, FULL)
CELLS = "cells"  # the directory of a comparison's cells
LAYOUT = 1  # of a cell's file; another number makes all of them anew
# What of this package can decide no figure. All else can: another version of it, released or not, makes all cells anew.
UNINVOLVED = (
    *("doctor", "hub", "verification", "requirements.py", "words.py"),
    *("report/card.py", "report/markdown.py", "report/pictures"),
    *("compare/forecast.py", "compare/pictures.py", "compare/results.py", "compare/table.py", "compare/workers.py"),
)
SAMPLE_BYTES = 4096  # of each tensor, that tell a model from a fine-tuned one


@dataclass(frozen=True)
class Row:
    """A line of the table: a method (`eqft:none` is eqft without calibration, `eqft@best` with another quality) at a
    width, or a ceiling in 16 bits.
    A width between two of the grid's is a mix of both, by count. `run` is the directory of a run that was finished
    before, which is called `method`; `sums` tells its files from any others."""

    method: str
    bits: float
    recipe: Recipe | None
    rates: tuple[float, ...]
    bits_per_weight: float
    run: Path | None = None
    sums: str | None = None

    @property
    def name(self) -> str:
        """The row's name in file names."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.method)}-{self.bits:g}bit"

    @property
    def fresh(self) -> bool:
        """Whether the adapter is PEFT's own start, that a seed draws."""
        if self.recipe is None:
            return self.method == LORA
        method = get_method(self.recipe.method)
        return method.start == "none" and method.factors is None


@dataclass(frozen=True)
class Cell:
    """A measurement: of a row's start, or of where fine-tuning ends from it with one learning rate and seed."""

    row: Row
    rate: float | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        return f"{self.row.name}/{'start' if self.rate is None else f'rate{self.rate:g}-seed{self.seed}'}"


@dataclass(frozen=True)
class Comparison:
    """A whole table on one model. `directory` is the checkpoint's, `out` the comparison's; `training` is None for
    starts alone. Perplexity is over non-overlapping windows of `window` tokens of each text."""

    model: str
    directory: Path
    out: Path
    rows: tuple[Row, ...]
    texts: tuple[Text, ...]
    window: int
    training: Training | None
    learn: Text | None
    validation: Text | None
    seeds: tuple[int, ...]
    device: str
    fingerprint: str
    keep_runs: bool = False

    @property
    def learning(self) -> tuple[Training, Text, Text]:
        """How it is trained, on what, and what learning rates are chosen by; for comparisons with fine-tuning."""
        assert self.training is not None
        assert self.learn is not None
        assert self.validation is not None
        return self.training, self.learn, self.validation

    def sweep(self, row: Row) -> list[Cell]:
        """The first seed at every learning rate."""
        return [Cell(row, rate, self.seeds[0]) for rate in row.rates] if self.training else []

    def repeats(self, row: Row, rate: float) -> list[Cell]:
        """The other seeds at the learning rate that was best."""
        return [Cell(row, rate, seed) for seed in self.seeds[1:]]

    @property
    def trust_remote_code(self) -> bool:
        return any(row.recipe is not None and row.recipe.trust_remote_code for row in self.rows)

    @property
    def cells(self) -> int:
        return sum(1 + len(self.sweep(row)) + (len(self.seeds) - 1) * bool(self.training) for row in self.rows)

    def plan(self, recipe: Recipe) -> Plan:
        """Plan the run of a row's recipe."""
        return make_plan(recipe, self.directory, self.model, self.directory if recipe.base is not None else None)

    def run_directory(self, row: Row) -> Path:
        return row.run or self.out / CELLS / row.name / "run"

    def file(self, cell: Cell) -> Path:
        return self.out / CELLS / f"{cell.name}.json"

    def digest(self, cell: Cell) -> str:
        """Hash all that decides what a cell finds."""
        value = {**self._measuring, **self._starting[cell.row.name]}
        if cell.rate is not None:
            training, learn, validation = self.learning
            data = [learn.digest, validation.digest]
            value |= {"training": asdict(training), "data": data, "rate": cell.rate, "seed": cell.seed}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def _measuring(self) -> dict[str, Any]:
        texts = [text.digest for text in self.texts]
        return {
            **{"layout": LAYOUT, "versions": versions(), "code": code(), "device": self.device},
            **{"model": self.fingerprint, "texts": texts, "window": self.window},
        }

    @cached_property
    def _starting(self) -> dict[str, dict[str, Any]]:
        return {
            row.name: {"method": row.method, "recipe": recipe_facts(row.recipe), "run": row.sums} for row in self.rows
        }


def recipe_facts(recipe: Recipe | None) -> dict[str, Any] | None:
    """Return what of a recipe decides the bytes that are written, with the hash of a file that it calibrates on."""
    if recipe is None:
        return None
    facts = recipe.model_dump(exclude={"model", "base", "revision", "device", "max_shard_size"})
    file = Path(recipe.calibration)
    if recipe.calibrated and file.is_file():
        facts["calibration"] = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return facts


@cache
def code() -> str:
    """Hash the code that can decide a figure."""
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        if not any(file.is_relative_to(package / name) for name in UNINVOLVED):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash a checkpoint's configuration, its headers and the first bytes of each tensor."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.first_bytes(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
