"""The model card of an export: README.md beside a run in another form, with how its reader loads it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qinit.report.card import CARD_NAME, front_matter, measured_rows, weight_rows, with_hub_base
from qinit.report.report import Report

LOAD = "## Load\n"
ADAPTERS = {
    False: "the LoRA adapter of rank {rank} that was solved with them, which already repairs the quantization",
    True: "a LoRA adapter that was trained on them, starting from the one that qinit made",
}
TRAINED = "What is measured here is said of the start, before the training.\n"

TEMPLATE = """\
---
{front}---

# {title}

The weights of `{model}`, quantized to {bits} bits by qinit, as {reader} reads them, with {adapter}.
{exact}

## Load
{load}

## Measured
{trained}| | |
|---|---|
{rows}{notes}
Command of the run:
```
{command}
```
Per-layer figures, versions and the full recipe are in `qinit.json`.
"""


def write_export_card(
    directory: Path, report: Report, source: dict[str, Any], *, library: str, tags: Sequence[str], load: str
) -> None:
    """Write README.md into an export's directory: `report` is what lies beside it, `source` the metadata of the run's
    own card, `library` and `tags` are for the Hub, and `load` is Markdown on how it is loaded from within."""
    export = report.export
    assert export is not None
    totals, name = report.totals, report.model.rstrip("/").split("/")[-1]
    bits = f"{totals['nominal_bits']:g}"
    rows = {
        "quantized layers": f"{totals['layers']} ({totals['layers_kept']} kept as they are)",
        **weight_rows(report),
        "relative weight error, base alone": f"{totals['error_start']:.4f}",
        "relative weight error, base + adapter": f"{totals['error']:.4f}",
        **measured_rows(totals),
    }
    lost = export.lost
    text = TEMPLATE.format(
        front=yaml.safe_dump(front_matter(report, source, library, [export.to, *tags]), sort_keys=False),
        title=f"{name}, {bits} bits, {export.to}",
        model=report.model,
        bits=bits,
        reader=export.reader,
        adapter=ADAPTERS[export.trained].format(rank=report.recipe["rank"]),
        exact=f"This form does not hold all of the run: {lost}." if lost else "They are the run's, to the last bit.",
        load=load.strip(),
        trained=f"{TRAINED}\n" if export.trained else "",
        rows="".join(f"| {what} | {value} |\n" for what, value in rows.items()),
        notes="".join(f"\n- {note}" for note in report.notes) + ("\n" if report.notes else ""),
        command=report.command,
    )
    (directory / CARD_NAME).write_text(text, encoding="utf-8")


def download_lines(repo_id: str, revision: str | None = None) -> list[str]:
    """Return the shell's line that brings an export from the Hub, after which its card's lines hold as they stand."""
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    place = repo_id.rpartition("/")[2]
    return [f"hf download {repo_id}{at} --local-dir {place} && cd {place}"]


def hub_export_card(text: str, repo_id: str) -> str:
    """Return an export's card as it stands on the Hub; all else is kept, also what a person wrote into it."""
    lines = "".join(f"{line}\n" for line in download_lines(repo_id))
    return with_hub_base(text.replace(LOAD, f"{LOAD}```\n{lines}```\n", 1))
