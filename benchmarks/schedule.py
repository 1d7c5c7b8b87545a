"""Why eqft's row is what it is at 2 bits: start, relaxation and rounds, on the demo model, no data.

    python benchmarks/schedule.py [--model DIR --text FILE] [--bits 2]

Variants of one row, solved in memory and put in place of the weights; perplexity on held-out text.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from common import conclude, load_tokens
from transformers import AutoModelForCausalLM

from qinit.evaluate.figures import perplexity
from qinit.grids import GRIDS
from qinit.solver.methods import METHODS, Method
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec, seed_of
from qinit.source.checkpoint import Checkpoint
from qinit.source.demo import demo_directory, held_out_text

EQFT = METHODS["eqft"]
LOW_RANK_FIRST = replace(EQFT, start="low-rank")
VARIANTS: dict[str, tuple[Method, int]] = {
    "min-max scales": (replace(LOW_RANK_FIRST, search="minmax", relaxation=1.0), 5),
    "quantize first": (replace(EQFT, start="quantize"), 5),
    "low rank first": (replace(LOW_RANK_FIRST, relaxation=1.0), 5),
    "low rank first, relaxed 1.5": (replace(LOW_RANK_FIRST, relaxation=1.5), 5),
    "low rank first, relaxed 2 (eqft)": (LOW_RANK_FIRST, 5),
    "low rank first, relaxed 2.5": (replace(LOW_RANK_FIRST, relaxation=2.5), 5),
    "low rank first, 10 rounds": (replace(LOW_RANK_FIRST, relaxation=1.0), 10),
    "low rank first, relaxed 2, 10 rounds": (LOW_RANK_FIRST, 10),
    "low rank first, relaxed 2.5, 10 rounds": (replace(LOW_RANK_FIRST, relaxation=2.5), 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--bits", default="2")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--json", type=Path, default=None, help="FILE.json writes FILE-2bit.json and so on")
    options = parser.parse_args()
    directory = options.model or demo_directory()
    tokens = load_tokens(directory, options.text.read_text(encoding="utf-8") if options.text else held_out_text())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    originals = {name: layer.weight.data.clone() for name, layer in layers.items()}
    reference = perplexity(model, tokens, options.window)
    ranks = (16, max(1, Checkpoint.open(directory).config["hidden_size"] // 100))

    for bits in map(int, options.bits.split(",")):
        rows = []
        for name, (method, rounds) in VARIANTS.items():
            errors, excess = [], []
            for rank in ranks:
                squared = total = 0.0
                for layer_name, layer in layers.items():
                    weight = originals[layer_name]
                    spec = LayerSpec(method, bits, 64, min(rank, *weight.shape), rounds)
                    solution = solve(weight, spec, seed_of(layer_name, 0))
                    assert solution.low_rank is not None
                    quantized = GRIDS[method.grid].dequantize(solution.quantized)
                    layer.weight.data = quantized + solution.low_rank.B @ solution.low_rank.A
                    energy = float(weight.square().sum())
                    squared, total = squared + solution.error**2 * energy, total + energy
                excess.append(math.log(perplexity(model, tokens, options.window) / reference))
                errors.append(math.sqrt(squared / total))
            rows.append({"variant": name, "errors": errors, "excess_nats": excess})
        value = {"model": directory.name, "bits": bits, "full_precision": reference, "ranks": list(ranks), "rows": rows}
        file = options.json and options.json.with_name(f"{options.json.stem}-{bits}bit.json")
        conclude("schedule", value, file, seeds=[0])


if __name__ == "__main__":
    main()
