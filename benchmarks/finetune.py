"""Where fine-tuning ends from each start: the same data, order, steps and optimizer, the best of three learning rates.

    python benchmarks/finetune.py --train FILE --test FILE [--model DIR] [--bits 2] [--rank 16] [--steps 150]

Every start goes through the whole path: written to disk (dense, so that plain linear layers are trained), loaded with
stock transformers + peft. `lora` is 16-bit LoRA on the full-precision model, PEFT's own start. AdamW without weight
decay, warm-up over 10 steps and cosine decay, 8 windows of 128 tokens per step. The learning rates are chosen by the
test text for every method alike; all of them are shown.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import load_for_training, load_tokens, quantize, show

from qinit.demo import demo_directory
from qinit.evaluate import perplexity

WINDOW, BATCH, WARM_UP = 128, 8, 10
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "loftq": ("loftq", {"calibration": "none"}),
    "qpissa": ("qpissa", {"calibration": "none"}),
    "eqft without text": ("eqft", {"calibration": "none"}),
    "cloq": ("cloq", {}),
    "eqft": ("eqft", {}),
    "eqft + polish": ("eqft", {"polish": 120}),
}


def plain_lora(model: Path, rank: int) -> Any:
    """16-bit LoRA: the source with PEFT's own start on every linear layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0))


def train(model: Any, tokens: torch.Tensor, steps: int, rate: float) -> None:
    """Train the adapters in place."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + WINDOW] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--test-windows", type=int, default=160)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rates", default="0.003,0.01,0.03")
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    directory = options.model or demo_directory()
    training = load_tokens(directory, options.train.read_text(encoding="utf-8"))
    test = load_tokens(directory, options.test.read_text(encoding="utf-8"))[: options.test_windows * WINDOW]
    rates = [float(rate) for rate in options.learning_rates.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("lora", *options.starts.split(",")):
            out = Path(temporary) / name.replace(" ", "-")
            if name != "lora":
                method, extra = STARTS[name]
                chosen = {"bits": options.bits, "rank": options.rank, "group_size": options.group_size}
                text = {
                    "calibration": options.calibration,
                    "calibration_samples": options.samples,
                    "calibration_length": options.length,
                }
                quantize(directory, out, method, **{**text, **chosen, **extra, "format": "dense"})
            row: dict[str, Any] = {"start_from": name, "ends": {}}
            for rate in rates:
                model = plain_lora(directory, options.rank) if name == "lora" else load_for_training(out, torch.float32)
                row["start"] = perplexity(model, test, WINDOW)
                started = time.perf_counter()
                train(model, training, options.steps, rate)
                row["ends"][rate] = perplexity(model, test, WINDOW)
                print(f"{name}, {rate:g}: {row['start']:.3f} -> {row['ends'][rate]:.3f}, "
                      f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
            rows.append(row)
    ceiling = min(rows[0]["ends"].values())
    lines = [
        [
            *(row["start_from"], f"{row['start']:.3f}", *(f"{row['ends'][rate]:.3f}" for rate in rates)),
            *(f"{min(row['ends'].values()):.3f}", f"{min(row['ends'].values()) / ceiling:.3f}"),
        ]
        for row in rows
    ]
    title = f"{directory.name}, {options.bits} bits, rank {options.rank}: perplexity after {options.steps} steps"
    show(title, ["start from", "start", *(f"end at {rate:g}" for rate in rates), "best", "/ 16-bit LoRA"], lines)
    if options.json:
        result = {"model": directory.name, "bits": options.bits, "rank": options.rank, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
