"""Writes into docs/trainers what `qinit trainer-config` writes, and which trainer takes what: `make commands`.

    python docs/trainer_files.py [--check]

With --check nothing is written; the exit code is 1 if something would be. In a trainer's page it is the block of code
below the line that names the command; in the overview, the table.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from qinit.report.report import LayerRow, Report
from qinit.trainers import TRAINERS, TrainableRun, Trainer
from qinit.trainers.training import Training

PAGES = Path(__file__).resolve().parent / "trainers"
RUN, TRAINING = Path("/runs/Qwen2.5-7B-2bit-16rank"), Training.on("/data/train.jsonl")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "sh"}
BLOCK = re.compile(r"(?P<line>^`qinit trainer-config .*` writes:\n)\n```\w+\n.*?^```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"^\| trainer \|.*?\n(?=\n)", re.DOTALL | re.MULTILINE)


def sample(fmt: str, *widths: int) -> TrainableRun:
    """Return a run of Qwen2.5 whose layers have these widths."""
    layers = tuple(
        LayerRow(f"model.layers.{i}.mlp.up_proj", (64, 64), bits, 64, 16, 8192, 1280, 0.4, 0.2, (), 0.1)
        for i, bits in enumerate(widths)
    )
    recipe = {"format": fmt, "method": "eqft", "bits": 2, "rank": 16}
    report = Report("Qwen/Qwen2.5-7B", "", recipe, {"class": "Qwen2ForCausalLM"}, {}, {}, (), layers)
    return TrainableRun(RUN, report, {"r": 16, "lora_alpha": 16})


def with_file(page: str, trainer: Trainer) -> str:
    """Return a trainer's page with what is written for it: for a packed run where it takes one."""
    run = next((run for run in (sample("gptq", 2), sample("dense", 2)) if not trainer.cannot_take(run)), None)
    if run is None:
        return page
    block = f"\n```{LANGUAGES[trainer.suffix]}\n{trainer.config(run, TRAINING)}```"
    page, count = BLOCK.subn(lambda match: match["line"] + block, page)
    if count != 1:
        sys.exit(f"error: docs/trainers/{trainer.name}.md must have one block below `qinit trainer-config ...` writes:")
    return page


def with_table(page: str) -> str:
    """Return the overview with the table of what each trainer takes."""
    runs = {"dense": sample("dense", 2), "gptq": sample("gptq", 2), "gptq, mixed widths": sample("gptq", 2, 3)}
    rows = [f"| trainer | {' | '.join(runs)} | known by |", "|---" * (len(runs) + 2) + "|"]
    for trainer in TRAINERS.values():
        takes = ["no" if trainer.cannot_take(run) else "yes" for run in runs.values()]
        rows.append(f"| [{trainer.title}]({trainer.name}.md) | {' | '.join(takes)} | {trainer.seen} |")
    return TABLE.sub(lambda _: "\n".join(rows) + "\n", page)


def main() -> None:
    check = sys.argv[1:] == ["--check"]
    for file in sorted(PAGES.glob("*.md")):
        page = file.read_text(encoding="utf-8")
        found = with_table(page) if file.stem == "index" else with_file(page, TRAINERS[file.stem])
        if check and found != page:
            sys.exit(f"error: docs/trainers/{file.name} is not what qinit trainer-config writes; run make commands")
        if not check:
            file.write_text(found, encoding="utf-8")
    if TRAINERS.keys() != {file.stem for file in PAGES.glob("*.md")} - {"index"}:
        sys.exit("error: docs/trainers has not one page for each trainer")


if __name__ == "__main__":
    main()
