"""What `make demo` shows after `qinit eqft`: the start of each method, and the first training steps.

    python benchmarks/demo.py RUN_DIRECTORY

RUN_DIRECTORY is what `qinit eqft --bits 2 --rank 16` wrote. All perplexities are on text that the demo
model has not seen in training.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from common import full_precision, load_for_training, load_tokens, measure_start, show

from qinit.evaluate.figures import perplexity
from qinit.source.demo import demo_directory, held_out_text

WINDOW, STEPS, BATCH, LEARNING_RATE = 512, 8, 4, 2e-4
PEERS = ("qlora", "loftq", "qpissa")


def main() -> None:
    run_directory = Path(sys.argv[1])
    model = demo_directory()
    tokens = load_tokens(model, held_out_text())
    half = len(tokens) // 2 // WINDOW * WINDOW
    train, test = tokens[:half], tokens[half:]

    reference = perplexity(full_precision(model), test, WINDOW)
    rows = [["full precision", "16", f"{_megabytes(model):.1f}", "", f"{reference:.2f}", ""]]
    for method in PEERS:
        start = measure_start(model, test, WINDOW, method, bits=2, rank=16)
        totals = start.report.totals
        disk = totals["base_bytes"] + totals["adapter_bytes"]
        row = [method, f"{totals['grid_bits_per_weight']:.2f} (stored: 16)", f"{disk / 1e6:.1f}"]
        found = start.figures.perplexity
        rows.append([*row, f"{totals['error']:.3f}", f"{found:.2f}", _excess(found, reference)])
    trainee = load_for_training(run_directory, torch.float32)
    value = perplexity(trainee, test, WINDOW)
    totals = json.loads((run_directory / "qinit.json").read_text(encoding="utf-8"))["totals"]
    disk = totals["base_bytes"] + totals["adapter_bytes"]
    row = ["eqft (qinit)", f"{totals['bits_per_weight']:.2f}", f"{disk / 1e6:.1f}", f"{totals['error']:.3f}"]
    rows.append([*row, f"{value:.2f}", _excess(value, reference)])
    show(
        f"Start perplexity on held-out text: 2 bits, rank 16, {len(test)} tokens",
        ["method", "bits per weight", "MB on disk", "weight error", "perplexity", "over full precision"],
        rows,
    )

    print("\nTraining from there, AutoModelForCausalLM + PeftModel(is_trainable=True), AdamW on held-out text:")
    optimizer = torch.optim.AdamW([p for p in trainee.parameters() if p.requires_grad], lr=LEARNING_RATE)
    trainee.train()
    batches = train.view(-1, WINDOW)[: STEPS * BATCH].view(STEPS, BATCH, WINDOW)
    for step, batch in enumerate(batches):
        loss = trainee(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"  step {step + 1}: loss {loss.item():.4f}")
    after = perplexity(trainee, test, WINDOW)
    print(f"  perplexity on the other half of the text: {value:.2f} before, {after:.2f} after {STEPS} steps")


def _megabytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6


def _excess(value: float, reference: float) -> str:
    return f"+{math.log(value / reference):.3f} nats"


if __name__ == "__main__":
    main()
