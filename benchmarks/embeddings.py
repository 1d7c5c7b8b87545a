"""How much of an encoder's sentence embeddings is left where fine-tuning starts: the cosine to full precision.

    python benchmarks/embeddings.py --model DIR --text FILE [--sentences 500] [--rows RUN,...]

Every RUN is options of `qinit eqft` as a user gives them, e.g. "--calibration none" or "--polish 100", or nothing; a
start is written to disk and loaded with stock transformers + peft. An embedding is the mean of the last hidden states
of a sentence's tokens. The text is none that the runs were calibrated on. benchmarks/minilm.py makes a model.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from common import conclude
from qinit_cli.main import app

from qinit.report.card import snippet_of
from qinit.report.report import Report

SENTENCE = re.compile(r"[A-Z][^.!?]{40,300}[.!?]")
AT_ONCE = 32


def main() -> None:
    from transformers import AutoModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=500, help="so many of the text, evenly spread")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", default="--calibration none,", help="options of the runs, separated by commas")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    given = parser.parse_args()

    sentences = spread(given.text.read_text(encoding="utf-8"), given.sentences)
    full = embeddings(AutoModel.from_pretrained(given.model, dtype=torch.float32), given.model, sentences)
    rows = []
    for options in map(str.strip, given.rows.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "run"
            command = f"eqft {given.model} --bits {given.bits} --rank {given.rank} {options} --out {out}"
            started = time.perf_counter()
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                app(command.split(), standalone_mode=False)
            seconds = time.perf_counter() - started
            found = embeddings(as_printed(out), given.model, sentences)
            totals = Report.read(out).totals
        cosines = torch.cosine_similarity(found, full)
        rows.append(
            {
                **{"options": options, "text": totals.get("calibration", {}).get("text")},
                **{"bits_per_weight": totals["grid_bits_per_weight"], "cosine": float(cosines.mean())},
                **{"least": float(cosines.min()), "seconds": seconds},
            }
        )
        print(f"{options or 'as it is'}: cosine {cosines.mean():.4f}, {seconds:.0f} s", flush=True)
    result = {"model": given.model.name, "bits": given.bits, "rank": given.rank, "sentences": len(sentences)}
    conclude("embeddings", {**result, "rows": rows}, given.json, seeds=[0])


def spread(text: str, count: int) -> list[str]:
    """Return sentences of a text, evenly spread over it."""
    found = SENTENCE.findall(text)
    return [found[i * len(found) // count] for i in range(count)] if len(found) > count else found


def as_printed(run: Path) -> Any:
    """Load base and adapter with the lines that the run prints."""
    names: dict[str, Any] = {}
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        exec("\n".join(snippet_of(Report.read(run), str(run))), names)
    return names["model"].float()


@torch.no_grad()
def embeddings(model: Any, tokens_of: Path, sentences: list[str]) -> torch.Tensor:
    """Return the mean of each sentence's last hidden states [sentences, width]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokens_of)
    found = []
    for start in range(0, len(sentences), AT_ONCE):
        inputs = tokenizer(sentences[start : start + AT_ONCE], padding=True, return_tensors="pt")
        hidden = model.eval()(**inputs).last_hidden_state
        mask = inputs.attention_mask[..., None]
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


if __name__ == "__main__":
    main()
