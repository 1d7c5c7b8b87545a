"""What `--quality fast|balanced|best` gives on a real model, and what other methods do: where fine-tuning would start,
and what it took.

    python benchmarks/qualities.py --model DIR --text FILE [--runs DIR] [--windows 12] [--bits 2,3,4]
                                   [--qualities fast,...] [--methods loftq,...] [--measure-only]

Every run stays in `--runs`, so that what was broken off goes on, and what is finished is measured only. Methods have
their own defaults; those that need a text take what `--calibration auto` gives. All are loaded with stock transformers
+ peft, on the same text, at one rank. `--measure-only` measures what is in `--runs` already and makes nothing. In
`--json` rows stay that an earlier call on as many tokens has measured and this one has not.
benchmarks/smollm2.py makes the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import conclude, full_precision, load_tokens, measure_kept

from qinit.evaluate.figures import perplexity
from qinit.recipe import QUALITIES
from qinit.solver.methods import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=12, help="no more than so many windows of the text")
    parser.add_argument("--bits", default="2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--qualities", default=",".join(QUALITIES))
    parser.add_argument("--methods", default="", help="other methods, e.g. loftq,qpissa")
    parser.add_argument("--runs", type=Path, default=Path("build/qualities"), help="where they stay")
    parser.add_argument("--measure-only", action="store_true", help="leave out those that are not there yet")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file, or into it")
    options = parser.parse_args()

    tokens = load_tokens(options.model, options.text.read_text(encoding="utf-8"))
    tokens = tokens[: options.windows * options.window]
    full = full_precision(options.model)
    reference = perplexity(full, tokens, options.window)
    chosen: list[tuple[str, dict[str, Any]]] = [
        ("eqft", {"quality": q}) for q in filter(None, options.qualities.split(","))
    ]
    chosen += [(name, text_for(name)) for name in filter(None, options.methods.split(","))]
    rows = []
    for bits in map(int, options.bits.split(",")):
        for method, extra in chosen:
            run = options.runs / "-".join(filter(None, (method, extra.get("quality"), f"{bits}bit")))
            if options.measure_only and not run.is_dir():
                continue
            start = measure_kept(
                *(run, options.model, tokens, options.window, method),
                **{"reference": full, "bits": bits, "rank": options.rank, **extra},
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
    if options.json is not None and options.json.is_file():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        if all(before[key] == result[key] for key in ("model", "rank", "tokens")):
            rows = joined(before["rows"], rows)
    conclude("qualities", {**result, "rows": rows}, options.json, seeds=[0])


def joined(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of both, one for each width and method, the new one where both have it."""
    methods = [("eqft", quality) for quality in QUALITIES] + [(name, None) for name in METHODS]
    rows = {(row["bits"], row["method"], row["quality"]): row for row in (*old, *new)}
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], methods.index(key[1:])))]


def text_for(method: str) -> dict[str, Any]:
    """Return the options by which a method reads a text if it needs one, and only then."""
    return {} if METHODS[method].needs else {"calibration": "none"}


if __name__ == "__main__":
    main()
