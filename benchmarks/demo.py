"""What `make demo` shows after `qinit eqft`: the start of each method, and the same training from two of them.

    python benchmarks/demo.py RUN_DIRECTORY

RUN_DIRECTORY is what `qinit eqft --bits 2 --rank 16` wrote. The demo model knows documentation; it is trained on code,
the standard library's, and measured on modules that are in no training text. Data, order and optimizer are those of
`make compare` with its first seed; the steps are fewer. Each start has the learning rate that was found best for it
there, of the same four, on a third part of the code.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel would compile its dequantize: longer than all of this needs it

import torch
from common import full_precision, load_for_training, load_tokens, quantize, show

from qinit.evaluate.figures import perplexity
from qinit.source.demo import demo_directory, new_domain
from qinit.train.finetune import Training, finetune

BITS, RANK = 2, 16
PEERS = ("qlora", "loftq", "qpissa")
TRAINED = ("eqft", "qlora")
EVERY = 4  # one window in so many is measured on: a little of every module of the test text, to save time
STEPS = (8, 16, 24)  # after which the loss is measured; the last ends the training
COMPARISON = Path(__file__).resolve().parent.parent / "model_zoo/results/compare-demo.json"


def main() -> None:
    run_directory = Path(sys.argv[1])
    comparison = json.loads(COMPARISON.read_text(encoding="utf-8"))
    window = comparison["window"]
    model = demo_directory()
    train, test = (load_tokens(model, text) for text in new_domain())
    train = train[: -comparison["validation_tokens"]]
    test = test[: len(test) // window * window].view(-1, window)[::EVERY].flatten()

    reference = perplexity(full_precision(model), test, window)
    rows = [["full precision", "16", _megabytes(model), "", f"{reference:.2f}", ""]]
    starts: dict[str, tuple[Any, float]] = {}
    for method in (*PEERS, "eqft"):
        with tempfile.TemporaryDirectory() as temporary:
            out = run_directory if method == "eqft" else Path(temporary) / "run"
            if method != "eqft":
                quantize(model, out, method, bits=BITS, rank=RANK)
            trainee = load_for_training(out, torch.float32)
            totals = json.loads((out / "qinit.json").read_text(encoding="utf-8"))["totals"]
        value = perplexity(trainee, test, window)
        if method in TRAINED:
            starts[method] = trainee, value
        rows.append(
            [
                *(_named(method), _bits(totals), f"{(totals['base_bytes'] + totals['adapter_bytes']) / 1e6:.1f}"),
                *(f"{totals['error']:.3f}", f"{value:.2f}", f"+{math.log(value / reference):.3f} nats"),
            ]
        )
    show(
        f"Start: perplexity on {len(test)} tokens of code, {BITS} bits, rank {RANK}",
        ["method", "bits per weight", "MB on disk", "weight error", "perplexity", "over full precision"],
        rows,
    )

    training = Training(steps=STEPS[-1])
    print(f"\nTraining on code: the same {training.steps} steps of {training.batch} x {training.length} tokens")
    losses: dict[str, list[float]] = {}
    rates = {row["method"]: row["rate"] for row in comparison["rows"] if row["bits"] == BITS}
    for method in TRAINED:
        trainee, value = starts[method]
        print(f"  from {_named(method)} at learning rate {rates[method]:g} ...", flush=True)
        losses[method] = [math.log(value), *_train(trainee, train, test, training, rates[method], window)]
    print("Loss in nats on the code of the table above, which is in no training text:")
    rows = zip((0, *STEPS), *losses.values(), strict=True)
    show("", ["step", *map(_named, losses)], [[str(step), *(f"{loss:.3f}" for loss in found)] for step, *found in rows])
    for method, found in losses.items():
        print(f"Perplexity from {_named(method)}: {math.exp(found[0]):.2f} before, {math.exp(found[-1]):.2f} after")


def _train(
    model: Any, train: torch.Tensor, test: torch.Tensor, training: Training, rate: float, window: int
) -> list[float]:
    """Train a model in place; returns its loss on the test text after each of STEPS."""
    losses = []

    def look(step: int, loss: float) -> None:
        if step in STEPS:
            losses.append(math.log(perplexity(model, test, window)))

    finetune(model, train, training, rate=rate, seed=0, progress=look)
    return losses


def _named(method: str) -> str:
    return "eqft (qinit)" if method == "eqft" else method


def _bits(totals: dict[str, Any]) -> str:
    """Say how many bits a weight takes: as stored, or for the peers, which no packed format holds, as counted."""
    stored, counted = totals["bits_per_weight"], totals["grid_bits_per_weight"]
    return f"{stored:.2f}" if stored < 16 else f"{counted:.2f} (stored: 16)"


def _megabytes(directory: Path) -> str:
    return f"{sum(file.stat().st_size for file in directory.glob('*.safetensors')) / 1e6:.1f}"


if __name__ == "__main__":
    main()
