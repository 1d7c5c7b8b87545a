"""How close to full precision each method starts, at equal rank, on the same weights and text.

    python benchmarks/fidelity.py                       the demo model and its held-out text
    python benchmarks/fidelity.py --model DIR --text FILE [--window 512] [--bits 2,3,4] [--ranks 16,2]
    python benchmarks/fidelity.py --calibration self --polish 120       and what a calibration text adds

Every method goes through the whole path: written to disk, loaded with stock transformers + peft. The
default ranks are 16 and 1 % of the model's width. Bits per weight count scales and zero points: for the
normal-float peers as LoftQ and bitsandbytes keep them (float32 absmax per block), for qinit as stored. KL is that of
the next token from the model in full precision, on the same text.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from common import conclude, full_precision, load_tokens, measure_start

from qinit.evaluate.figures import perplexity
from qinit.source.checkpoint import Checkpoint
from qinit.source.demo import demo_directory, held_out_text

DATA_FREE = ("qlora", "loftq", "qpissa", "eqft")
CALIBRATED = ("lqer", "qera", "eora", "cloq", "srr", "eqft")


def variants(options: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """Return label, method and options of every row of the table."""
    rows = [(name, name, {"calibration": "none"}) for name in DATA_FREE]
    if options.calibration:
        text = {
            "calibration": options.calibration,
            "calibration_samples": options.samples,
            "calibration_length": options.length,
        }
        rows += [(f"{name} + text", name, text) for name in CALIBRATED]
        if options.polish:
            rows.append((f"eqft + text + polish {options.polish}", "eqft", {**text, "polish": options.polish}))
    return [row for row in rows if options.methods is None or row[1] in options.methods.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=None, help="no more than so many windows of the text")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--ranks", default=None)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--format", default=None, help="for qinit's row; dense for widths that gptq cannot hold")
    parser.add_argument("--calibration", default=None, help="also run the methods that measure what layers see")
    parser.add_argument("--polish", type=int, default=0, help="with calibration: also eqft with so many steps")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--methods", default=None, help="only these, e.g. loftq,eqft (loftq is what ratios are to)")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    options = parser.parse_args()

    model = options.model or demo_directory()
    text = options.text.read_text(encoding="utf-8") if options.text else held_out_text()
    tokens = load_tokens(model, text)[: options.windows and options.windows * options.window]
    width = Checkpoint.open(model).config["hidden_size"]
    ranks = [int(r) for r in options.ranks.split(",")] if options.ranks else [16, max(1, width // 100)]
    full = full_precision(model)
    reference = perplexity(full, tokens, options.window)
    print(f"{model.name}: width {width}, {len(tokens)} tokens, full precision perplexity {reference:.3f}")
    rows = []
    for bits in map(int, options.bits.split(",")):
        for rank in ranks:
            for label, method, extra in variants(options):
                chosen = {"bits": bits, "rank": rank, "group_size": options.group_size, **extra}
                if options.format:
                    chosen["format"] = options.format
                start = measure_start(model, tokens, options.window, method, reference=full, **chosen)
                print(f"{bits} bits, rank {rank}, {label}: {start.figures.perplexity:.3f}", flush=True)
                totals = start.report.totals
                excess = math.log(start.figures.perplexity / reference)
                packed = totals[
                    "bits_per_weight" if start.report.recipe["format"] == "gptq" else "grid_bits_per_weight"
                ]
                rows.append(
                    {
                        "bits": bits,
                        "rank": rank,
                        "method": label,
                        "bits_per_weight": packed,
                        "weight_error": totals["error"],
                        "perplexity": start.figures.perplexity,
                        "excess_nats": excess,
                        "kl": start.figures.kl,
                    }
                )
    result = {"model": model.name, "tokens": len(tokens), "full_precision": reference, "rows": rows}
    conclude("fidelity", result, options.json, seeds=[0])


if __name__ == "__main__":
    main()
