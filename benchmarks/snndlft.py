"""SNN-DLFT on real models: AdaLoRA, its spiking version, and that with the better half of the layers, or the best one.

    python benchmarks/snndlft.py --model all-MiniLM-L6-v2 --sources DIR --json FILE      which text a passage is from
    python benchmarks/snndlft.py --model demo --sources DIR --json FILE                  perplexity on WikiText-2

An encoder learns to tell by six words, without capitals and signs, whether a passage is of WikiText-2, of C4 or of
Shakespeare's plays; its accuracy is measured on passages that it has not seen, as they are and with noise
(benchmarks/noise.py). A language model learns on WikiText-2's validation text and is measured on its test text. `DIR`
has wikitext-2.valid.txt, wikitext-2.test.txt, c4-sample.jsonl and tinyshakespeare.txt. Every run stays in `--runs`, so
that what was broken off goes on. A cell has a process of its own, for its peak memory. One learning rate for all.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import conclude
from noise import NOISES
from rich import print as say

from qinit.evaluate.subject import find_model
from qinit.files.atomic import replace_text
from qinit.report.report import REPORT_NAME
from qinit.snndlft import SnnDlftConfig, load
from qinit.snndlft.metrics import measured
from qinit.snndlft.tasks import Classes, Data, predictions, read_task
from qinit.snndlft.training import Asked, run
from qinit.source.checkpoint import read_json
from qinit.source.vocabulary import Facts

VARIANTS: dict[str, dict[str, Any]] = {
    "AdaLoRA": {"spiking": False, "layer_wise": "all"},
    "spiking": {"layer_wise": "all"},
    "spiking, half": {"layer_wise": "half"},
    "spiking, single": {"layer_wise": "single"},
}
WORDS, PASSAGES, HELD_OUT = 6, 500, 200  # words of a passage; passages of each class
NOISE_NAME = "noise.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory, or demo")
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens in each window of a language model")
    parser.add_argument("--windows", type=int, default=64, help="so many windows of the test text, about")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("build/snndlft"), help="where they stay")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    given = parser.parse_args()

    base = find_model(given.model)
    name = base.name if given.model != "demo" else "demo"
    causal = Facts.read(base, read_json(base / "config.json", "")).causal
    place = given.runs / name
    place.mkdir(parents=True, exist_ok=True)
    data = (text_data if causal else passage_data)(given, place)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    rows = []
    for variant, options in VARIANTS.items():
        for seed in seeds:
            config = SnnDlftConfig(
                **options, tinit=given.steps // 10, tfinal=given.steps // 5, deltaT=max(1, given.steps // 40)
            )
            asked = Asked(
                name, base, replace(data, seed=seed), config, given.steps, given.batch, given.rate, device="cpu"
            )
            rows.append(cell(asked, place / f"{variant.replace(', ', '-')}-{seed}", variant))
            say(f"{variant}, seed {seed}: {rows[-1]}", flush=True)
    what = {"model": name, "task": "language" if causal else "passages", "steps": given.steps, "batch": given.batch}
    conclude(
        "snndlft", {**what, "rate": given.rate, "threads": torch.get_num_threads(), "rows": rows}, given.json, seeds
    )


def cell(asked: Asked, out: Path, variant: str) -> dict[str, Any]:
    """Train one, in a process of its own, unless that was done; returns its row."""
    if not (out / REPORT_NAME).is_file():
        process = multiprocessing.get_context("fork").Process(target=_train, args=(asked, out))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{out.name}: ended with {process.exitcode}")
    report = json.loads((out / REPORT_NAME).read_text(encoding="utf-8"))
    totals, rows = report["totals"], report["layers"]
    kept = (
        "metric",
        "before",
        "after",
        "trainable",
        "head",
        "optimizer_bytes",
        "seconds_per_step",
        "peak_memory_bytes",
    )
    row = {"variant": variant, "seed": asked.data.seed, **{key: totals[key] for key in kept}}
    row["rank_in_use"] = totals["ranks"] / totals["modules"]
    first = (asked.config.tinit // asked.config.deltaT + 1) * asked.config.deltaT  # the step of the first choice
    row["ever_trained"] = sum(each["steps"] > first for each in rows)
    row |= {"spike_rate": totals.get("spike_rate"), "energy": totals.get("energy_per_token")}
    if (out / NOISE_NAME).is_file():
        row["noise"] = json.loads((out / NOISE_NAME).read_text(encoding="utf-8"))
    return row


def _train(asked: Asked, out: Path) -> None:
    torch.manual_seed(asked.data.seed)
    run(asked, out, command=f"benchmarks/snndlft.py, {out.name}")
    task = read_task(asked.data, asked.base)
    if isinstance(task, Classes):
        found = noisy(load(out), task)
        replace_text(out / NOISE_NAME, json.dumps(found))


def noisy(model: Any, task: Classes) -> dict[str, float]:
    """Return a classifier's accuracy under each kind of noise; the noise is the same for all."""
    labels = torch.tensor(task.held_out.labels).numpy()
    found = {}
    for kind, change in NOISES.items():
        texts = [(change(text, 0),) for (text,) in task.held_out.texts]
        found[kind] = measured("accuracy", labels, predictions(model, task, texts), len(task.classes))
    return found


def text_data(given: argparse.Namespace, place: Path) -> Data:
    """WikiText-2: the validation text to learn from, and the start of the test text."""
    held_out = place / "held-out.txt"
    text = (given.sources / "wikitext-2.test.txt").read_text(encoding="utf-8")
    held_out.write_text(text[: 4 * given.length * given.windows], encoding="utf-8")
    return Data(given.sources / "wikitext-2.valid.txt", held_out, (), None, "accuracy", given.length, 0)


def passage_data(given: argparse.Namespace, place: Path) -> Data:
    """Passages of three texts, drawn without replacement; no passage is in both files."""
    lines = (given.sources / "c4-sample.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {
        "wikipedia": (given.sources / "wikitext-2.valid.txt").read_text(encoding="utf-8"),
        "web": "\n".join(json.loads(line)["text"] for line in lines),
        "plays": (given.sources / "tinyshakespeare.txt").read_text(encoding="utf-8"),
    }
    chance, rows = random.Random(0), {"train": [], "held-out": []}
    for kind, text in texts.items():
        words = re.sub(r"[^a-z ]+", " ", text.replace("<unk>", " ").lower()).split()
        passages = [" ".join(words[at : at + WORDS]) for at in range(0, len(words) - WORDS, WORDS)]
        drawn = chance.sample(sorted(set(passages)), PASSAGES + HELD_OUT)
        rows["train"] += [(passage, kind) for passage in drawn[:PASSAGES]]
        rows["held-out"] += [(passage, kind) for passage in drawn[PASSAGES:]]
    for name, found in rows.items():
        with (place / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "source"), *found])
    return Data(place / "train.csv", place / "held-out.csv", ("text",), "source", "accuracy", 32, 0)


if __name__ == "__main__":
    main()
