"""Why calibrated eqft is what it is: what was tried, on a model's own text, and how close each variant starts.

    python benchmarks/calibration.py [--model DIR --text FILE --window 512] [--bits 2] [--ranks 16,2] [--group-size 64]

Each variant changes one thing about the row, is solved in memory and put in place of the weights. Perplexity is on the
held-out text; KL is that of the next token between the model and its variant on fresh text that the model wrote
(another seed), which is the finer measure. Variants that lost are made here by replacing parts of the solver, and are
nowhere else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import conclude, load_tokens
from transformers import AutoModelForCausalLM
from two_sided import TwoSided

from qinit.calibration.output_metric import output_metrics
from qinit.calibration.walk import Seen, Walk
from qinit.evaluate.figures import perplexity
from qinit.grids import GRIDS
from qinit.linalg.low_rank import OutputMetric
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.solver import calibrated
from qinit.solver.methods import CALIBRATED, METHODS, Method
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec, seed_of
from qinit.solver.statistics import Statistics
from qinit.source.checkpoint import Checkpoint
from qinit.source.demo import demo_directory, held_out_text
from qinit.steps import finish
from qinit.text.samples import Samples
from qinit.text.sources import load_samples

CPU = torch.device("cpu")
EQFT = CALIBRATED["eqft"]


@contextmanager
def with_identity(statistics: Statistics) -> Iterator[torch.Tensor]:
    """Give H + mean(diag H) I."""
    hessian = statistics.hessian.clone()
    hessian.diagonal().add_(float(hessian.diagonal().mean()))
    yield hessian


def diagonal(metric: OutputMetric) -> OutputMetric:
    """Forget how outputs go together."""
    return OutputMetric(torch.zeros_like(metric.leading), metric.rest + metric.leading.square().sum(0))


def a_share(share: float) -> dict[str, Any]:
    """Replaces `corrected` by one that makes good a share of the drift only."""
    whole = calibrated.corrected
    return {"corrected": lambda weight, drift, factor, _: torch.lerp(weight, whole(weight, drift, factor), share)}


# name: row, rounds, mode, what is replaced in the solver, text
Variant = tuple[Method, int, str, dict[str, Any], str]
ROUNDS = EQFT.iterations
TWO_SIDED = TwoSided()
TEXTS: dict[str, tuple[Samples, dict[str, OutputMetric]]] = {}  # by source, and G on it
VARIANTS: dict[str, Variant] = {
    "no text (data-free eqft)": (METHODS["eqft"], 5, "parallel", {}, "self"),
    "random tokens": (EQFT, ROUNDS, "sequential", {}, "random"),
    "eqft": (EQFT, ROUNDS, "sequential", {}, "self"),
    "one pass, each layer for itself (parallel)": (EQFT, ROUNDS, "parallel", {}, "self"),
    "sequential without correcting the drift": (EQFT, ROUNDS, "sequential", a_share(0.0), "self"),
    "half of the drift": (EQFT, ROUNDS, "sequential", a_share(0.5), "self"),
    "quantize first": (replace(EQFT, start="quantize"), ROUNDS, "sequential", {}, "self"),
    "low rank first": (replace(EQFT, start="low-rank"), ROUNDS, "sequential", {}, "self"),
    "H with the adapter's directions": (EQFT, ROUNDS, "sequential", {"without": lambda h, _: h.clone()}, "self"),
    "no coordinate descent": (replace(EQFT, passes=0), ROUNDS, "sequential", {}, "self"),
    "one pass of it over each block": (replace(EQFT, passes=1), ROUNDS, "sequential", {}, "self"),
    "nearest rounding": (replace(EQFT, rounding="nearest"), 5, "sequential", {}, "self"),
    "act order": (replace(EQFT, act_order=True), ROUNDS, "sequential", {}, "self"),
    "1 round": (EQFT, 1, "sequential", {}, "self"),
    "2 rounds": (EQFT, 2, "sequential", {}, "self"),
    "5 rounds": (EQFT, 5, "sequential", {}, "self"),
    "damping .01 in rounding and correction": (EQFT, ROUNDS, "sequential", {"DAMPING": 0.01}, "self"),
    "H as measured": (EQFT, ROUNDS, "sequential", {"SHRINKAGE": 0.0}, "self"),
    "a tenth of its diagonal added": (EQFT, ROUNDS, "sequential", {"SHRINKAGE": 0.1}, "self"),
    "its whole diagonal added": (EQFT, ROUNDS, "sequential", {"SHRINKAGE": 1.0}, "self"),
    "its mean diagonal added": (EQFT, ROUNDS, "sequential", {"stable_hessian": with_identity}, "self"),
    "all outputs alike (no G)": (replace(EQFT, metric="activation"), ROUNDS, "sequential", {}, "self"),
    "the diagonal of G": (EQFT, ROUNDS, "sequential", {"outputs": diagonal}, "self"),
    "rows rounded with feedback under G too (two-sided)": (
        *(EQFT, ROUNDS, "sequential"),
        {"GRIDS": {**GRIDS, "int": TWO_SIDED}},
        "self",
    ),
    "rank kept before quantizing (the row of SRR)": (METHODS["srr"], 1, "sequential", {}, "self"),
}


@torch.inference_mode()
def divergence(model: Any, tokens: torch.Tensor, reference: list[torch.Tensor]) -> float:
    """Mean KL in nats of the model's next-token distribution from the reference's."""
    total = 0.0
    for batch, wanted in zip(tokens.split(8), reference, strict=True):
        logits = model(input_ids=batch).logits.float().log_softmax(-1)
        total += float((wanted.exp() * (wanted - logits)).sum())
    return total / tokens.numel()


def run(variant: Variant, directory: Path, options: Any, bits: int, rank: int, repair: Callable[..., None]) -> None:
    """Solve every layer with a variant; `repair` gets each layer's name and Q + B A."""
    row, rounds, mode, replaced, source = variant
    recipe = make_recipe(
        model=str(directory), bits=bits, rank=rank, group_size=options.group_size, format="dense", calibration=source
    )
    plan = make_plan(recipe, directory, directory.name)
    if source not in TEXTS:
        config = plan.checkpoint.config
        samples = load_samples(source, directory, config, samples=options.samples, length=options.length, seed=0)
        TEXTS[source] = samples, finish(output_metrics(plan, samples, CPU))
    samples, measured = TEXTS[source]
    changed = replaced.get("outputs", lambda metric: metric)
    metrics = {name: changed(metric) for name, metric in measured.items()} if row.metric == "kfac" else {}
    with ExitStack() as stack:
        for name, value in replaced.items():
            if name != "outputs":
                stack.enter_context(patch.object(calibrated, name, value))
        for event in Walk(plan, samples, CPU, mode).visit():
            if not isinstance(event, Seen):
                continue
            spec = LayerSpec(row, bits, event.layer.group_size, event.layer.rank, rounds)
            name = event.layer.target.name
            statistics = event.statistics
            if statistics is not None:
                statistics = replace(statistics, output_metric=metrics.get(name))
                TWO_SIDED.metric = statistics.output_metric
            solution = solve(event.weight, spec, seed_of(name, 0), statistics)
            assert solution.low_rank is not None
            value = GRIDS[row.grid].dequantize(solution.quantized) + solution.low_rank.B @ solution.low_rank.A
            if event.repair is not None:  # sequential
                event.repair(event.layer, value)
            repair(name, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--bits", default="2")
    parser.add_argument("--ranks", default=None)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--variants", default=None, help="only these, separated by semicolons")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    directory = options.model or demo_directory()
    tokens = load_tokens(directory, options.text.read_text(encoding="utf-8") if options.text else held_out_text())
    tokens = tokens[: 40 * options.window]
    config = Checkpoint.open(directory).config
    ranks = [int(r) for r in options.ranks.split(",")] if options.ranks else [16, max(1, config["hidden_size"] // 100)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    fresh = load_samples("self", directory, config, samples=48, length=options.length, seed=777).tokens
    with torch.inference_mode():
        reference = [model(input_ids=batch).logits.float().log_softmax(-1) for batch in fresh.split(8)]
    full = perplexity(model, tokens, options.window)

    def repair(name: str, value: torch.Tensor) -> None:
        linear: Any = model.get_submodule(name)
        linear.weight.data = value.T if type(linear).__name__ == "Conv1D" else value

    chosen = options.variants.split(";") if options.variants else list(VARIANTS)
    rows = []
    for bits in map(int, options.bits.split(",")):
        for name in chosen:
            rows.append({"bits": bits, "variant": name, "perplexities": [], "kl": []})
            for rank in ranks:
                run(VARIANTS[name], directory, options, bits, rank, repair)
                rows[-1]["perplexities"].append(perplexity(model, tokens, options.window))
                rows[-1]["kl"].append(divergence(model, fresh, reference))
            print(rows[-1], flush=True)
    value = {"model": directory.name, "full_precision": full, "ranks": ranks, "rows": rows}
    conclude("calibration", value, options.json, seeds=[0])


if __name__ == "__main__":
    main()
