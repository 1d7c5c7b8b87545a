"""What mixed widths buy: the perplexity at each ratio, by sensitivity and by rules that look at nothing.

    python benchmarks/mixed.py [--model DIR --text FILE --window 512 --windows N] [--ranks 2] [--group-size 64]
                               [--calibration none] [--search | --runs sensitivity,uniform]

Every layer is solved at 2 and at 3 bits once; an allocation puts the layers of its choice together in memory (without
calibration that is what a run writes, byte for byte; with calibration each layer is solved for what the original model
delivers, where a run also lets later layers make good what earlier ones left: --runs ALLOCATIONS makes real runs,
written to disk and loaded by stock transformers + peft). `closed` is the share of the log-perplexity between 2 and 3
bits.
--search adds what no rule can be expected to reach: the best allocation that swapping layers one for one leads to when
every step is judged by the perplexity of the measured text itself (hundreds of evaluations; small models).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import conclude, load_tokens, measure_start
from transformers import AutoModelForCausalLM

from qinit.calibration.output_metric import output_metrics
from qinit.calibration.walk import Seen, Walk
from qinit.evaluate.figures import perplexity
from qinit.linalg.low_rank import OutputMetric
from qinit.plan.plan import Plan
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner.layer import read_weight
from qinit.solver.residual import as_loaded
from qinit.solver.solve import solve
from qinit.solver.spec import seed_of
from qinit.source.demo import demo_directory, held_out_text
from qinit.steps import finish
from qinit.text.for_run import text_for
from qinit.widths.budget import allotted, budget, items, options, planned
from qinit.widths.fisher import measure
from qinit.widths.knapsack import ROUNDING

CPU = torch.device("cpu")
RATIOS = (0.25, 0.5, 0.75)
SEEDS = range(5)


def solved(plan: Plan, samples: Any, metrics: dict[str, OutputMetric], bits: int) -> dict[str, torch.Tensor]:
    """Return Q + B A of every layer at one width."""
    found = {}
    if plan.recipe.calibrated:
        events = (event for event in Walk(plan, samples, CPU, "parallel").visit() if isinstance(event, Seen))
        seen = [
            (e.layer, e.weight, replace(e.statistics, output_metric=metrics.get(e.layer.target.name))) for e in events
        ]
    else:
        seen = [(layer, read_weight(layer, CPU), None) for layer in plan.quantized]
    for layer, weight, statistic in seen:
        spec = plan.layer_spec(layer)
        spec = type(spec)(**{**vars(spec), "bits": bits})
        solution = solve(weight, spec, seed_of(layer.target.name, plan.recipe.seed), statistic)
        assert solution.low_rank is not None
        found[layer.target.name] = as_loaded(solution.quantized, spec) + solution.low_rank.B @ solution.low_rank.A
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=None, help="no more than so many windows of the text")
    parser.add_argument("--ranks", default="2")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", default="none")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--search", action="store_true", help="also search on the measured text itself")
    parser.add_argument("--runs", default="", help="real runs by these allocations, e.g. sensitivity,uniform")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    directory = given.model or demo_directory()
    tokens = load_tokens(directory, given.text.read_text(encoding="utf-8") if given.text else held_out_text())
    tokens = tokens[: given.windows and given.windows * given.window]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    full = perplexity(model, tokens, given.window)
    results = []
    for rank in map(int, given.ranks.split(",")):
        common: dict[str, Any] = {"rank": rank, "group_size": given.group_size, "calibration": given.calibration}
        common |= {"calibration_samples": given.samples, "calibration_length": given.length}
        if given.runs:
            rows = by_runs(directory, model, tokens, given.window, common, given.runs.split(","))
        else:
            rows = in_memory(directory, model, tokens, given.window, common, given.search)
        low, high = (math.log(next(r["perplexity"] for r in rows if r["ratio"] == ratio)) for ratio in (0, 1))
        for row in rows:
            row["closed"] = (low - math.log(row["perplexity"])) / (low - high)
        results.append({"rank": rank, "rows": rows})
    value = {"model": directory.name, "full_precision": full, "calibration": given.calibration, "results": results}
    conclude("mixed", value, given.json, seeds=[0])


def in_memory(
    directory: Path, model: Any, tokens: torch.Tensor, window: int, common: dict[str, Any], search: bool
) -> list[Any]:
    """Solve every layer twice and put the allocations together."""

    def plan_for(ratio: float, allocation: str = "sensitivity", seed: int = 0) -> Plan:
        recipe = make_recipe(model=str(directory), ratio=ratio, allocation=allocation, seed=seed, **common)
        return make_plan(recipe, directory, directory.name)

    base = plan_for(0.5)
    samples = text_for(base, CPU, None)
    metrics = finish(output_metrics(base, samples, CPU)) if base.recipe.calibrated else {}
    values = {bits: solved(base, samples, metrics, bits) for bits in (2, 3)}
    sensitivity = finish(measure(base, options(base), samples, CPU, metrics=metrics))

    transposed = {layer.target.name: layer.target.module.transposed for layer in base.quantized}

    def perplexity_at(widths: dict[str, int]) -> float:
        for name, bits in widths.items():
            linear: Any = model.get_submodule(name)
            linear.weight.data = values[bits][name].T if transposed[name] else values[bits][name]
        return perplexity(model, tokens, window)

    def perplexity_of(plan: Plan) -> float:
        return perplexity_at(widths_of(plan))

    rows = []
    for ratio in (0, *RATIOS, 1):
        rows.append({"ratio": ratio, "allocation": "sensitivity"})
        rows[-1]["perplexity"] = perplexity_of(allotted(plan_for(ratio), sensitivity))
        for rule in ("uniform", "first", "last") if ratio in RATIOS else ():
            rows.append(
                {"ratio": ratio, "allocation": rule, "perplexity": perplexity_of(planned(plan_for(ratio, rule)))}
            )
        if ratio in RATIOS:
            drawn = [perplexity_of(planned(plan_for(ratio, "random", seed))) for seed in SEEDS]
            mean = math.exp(statistics.mean(map(math.log, drawn)))
            rows.append({"ratio": ratio, "allocation": "random", "perplexity": mean, "draws": drawn})
        if search and ratio in RATIOS:
            plan = allotted(plan_for(ratio), sensitivity)
            rows.append({"ratio": ratio, "allocation": "search on this text"})
            rows[-1]["perplexity"] = searched(plan, perplexity_at)
    return rows


def widths_of(plan: Plan) -> dict[str, int]:
    return {layer.target.name: layer.bits for layer in plan.quantized}


def searched(plan: Plan, loss: Callable[[dict[str, int]], float]) -> float:
    """Return the loss of the allocation that the best steps lead to from the plan's: a step widens one layer, and
    narrows at most one other, within the budget."""
    choices = items(plan, None)
    sizes = {item.names[0]: {choice.bits: choice.stored_bits for choice in item.totals} for item in choices}
    limit = budget(plan, choices) * (1 + ROUNDING)
    widths = widths_of(plan)
    low, high = min(plan.recipe.widths), max(plan.recipe.widths)
    least = loss(widths)
    while True:
        steps = []
        for widened in [name for name, bits in widths.items() if bits == low]:
            for narrowed in [None, *(name for name, bits in widths.items() if bits == high)]:
                step = {**widths, widened: high} | ({narrowed: low} if narrowed else {})
                if sum(sizes[name][bits] for name, bits in step.items()) <= limit:
                    steps.append((loss(step), step))
        best, widths = min(steps, key=lambda step: step[0], default=(least, widths))
        if best >= least:
            return least
        least = best


def by_runs(
    directory: Path, model: Any, tokens: torch.Tensor, window: int, common: dict[str, Any], allocations: list[str]
) -> list[Any]:
    """Make real runs, each measuring for itself, and compare what was loaded with the `model` in full precision."""
    rows = []
    for ratio in (0, *RATIOS, 1):
        for rule in allocations if ratio in RATIOS else ("sensitivity",):
            chosen = {**common, "ratio": float(ratio), "allocation": rule}
            chosen["format"] = "dense"  # stock loaders take no mixed gptq
            found = measure_start(directory, tokens, window, "eqft", reference=model, **chosen).figures
            rows.append({"ratio": ratio, "allocation": rule, "perplexity": found.perplexity, "kl": found.kl})
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
