"""qinit: quantized bases and LoRA adapters that start fine-tuning close to full precision.

from pathlib import Path
import qinit

recipe = qinit.make_recipe(bits=2, rank=16)
plan = qinit.make_plan(recipe, Path("Qwen2.5-0.5B"), "Qwen2.5-0.5B")
for event in qinit.run(plan, Path("out")):
    ...
model = qinit.load("out", trainable=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qinit.errors import QinitError
    from qinit.loading import load
    from qinit.plan.plan import Plan
    from qinit.planner.make import make_plan
    from qinit.recipe import Recipe, make_recipe
    from qinit.runner.again import polish_run
    from qinit.runner.run import run
    from qinit.solver.solve import solve
    from qinit.solver.spec import Solution

__version__ = "0.1.0"
__all__ = ["Plan", "QinitError", "Recipe", "Solution", "load", "make_plan", "make_recipe", "polish_run", "run", "solve"]

_HOMES = {
    "Plan": "plan.plan",
    "QinitError": "errors",
    "Recipe": "recipe",
    "Solution": "solver.spec",
    "load": "loading",
    "make_plan": "planner.make",
    "make_recipe": "recipe",
    "polish_run": "runner.again",
    "run": "runner.run",
    "solve": "solver.solve",
}


def __getattr__(name: str) -> Any:  # lazily: torch takes a second to import
    if name in _HOMES:
        return getattr(import_module(f"qinit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qinit' has no attribute '{name}'")
