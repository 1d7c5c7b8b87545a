"""What `--quality fast|balanced|best` gives on a real model: where fine-tuning would start, and what it took.

    python benchmarks/qualities.py --model DIR --text FILE [--windows 12] [--bits 2] [--qualities fast,...]

`--rows METHOD,...` adds methods with their own defaults, on the same text and rank. Every start is written to disk and
loaded with stock transformers + peft. benchmarks/smollm2.py makes the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import conclude, full_precision, load_tokens, measure_start

from qinit.evaluate.figures import perplexity
from qinit.recipe import QUALITIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=12, help="no more than so many windows of the text")
    parser.add_argument("--bits", default="2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--qualities", default=",".join(QUALITIES))
    parser.add_argument("--rows", default="", help="other methods, e.g. loftq,qpissa")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    options = parser.parse_args()

    tokens = load_tokens(options.model, options.text.read_text(encoding="utf-8"))
    tokens = tokens[: options.windows * options.window]
    full = full_precision(options.model)
    reference = perplexity(full, tokens, options.window)
    chosen: list[tuple[str, dict[str, Any]]] = [("eqft", {"quality": name}) for name in options.qualities.split(",")]
    chosen += [(name, {"calibration": "none"}) for name in filter(None, options.rows.split(","))]
    rows = []
    for bits in map(int, options.bits.split(",")):
        for method, extra in chosen:
            start = measure_start(
                options.model, tokens, options.window, method, reference=full, bits=bits, rank=options.rank, **extra
            )
            totals, found = start.report.totals, start.figures
            calibration = totals.get("calibration", {})
            rows.append(
                {
                    **{"bits": bits, "method": method, "quality": extra.get("quality")},
                    **{"bits_per_weight": totals["grid_bits_per_weight"], "text": calibration.get("text")},
                    **{"polish": calibration.get("polish", {}).get("steps", 0), "kl": found.kl},
                    **{"agreement": found.agreement, "perplexity": found.perplexity},
                    "seconds": start.seconds,
                }
            )
            print(f"{bits} bits, {method}, {extra}: KL {found.kl:.3f}, {start.seconds:.0f} s", flush=True)
    result = {"model": options.model.name, "rank": options.rank, "tokens": len(tokens), "full_precision": reference}
    conclude("qualities", {**result, "rows": rows}, options.json, seeds=[0])


if __name__ == "__main__":
    main()
