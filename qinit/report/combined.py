"""What several adapters of one base have become together, and the model card beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from qinit.report.card import CARD_NAME, is_hub_id
from qinit.report.markdown import table

TEMPLATE = """\
---
{front}---

# {count} adapters, combined

{count} LoRA adapters of the base `{base}`, made one by qinit ({how}). {start}

It is loaded, trained and served as any of them.

{parts}

Command:
```
{command}
```
"""
STARTED = "What training added to the start that all of them had was combined, and the start added once."
WHOLE = "No start was known: they were taken whole."


@dataclass(frozen=True)
class Part:
    """One of the adapters: the SHA-256 of its weights, its weight in the combination, and the size (Frobenius norm over
    all matrices) of what training added; without a start, of all that it holds."""

    name: str
    sha256: str
    weight: float
    added: float


@dataclass(frozen=True)
class Combined:
    """What was combined and how: `start` is the SHA-256 of the start's weights, None where there was none, and
    `start_size` its size, as those of the parts. `rank` is the largest."""

    base: str
    combination: str
    density: float | None
    parts: tuple[Part, ...]
    start: str | None
    start_size: float
    matrices: int
    rank: int
    bytes: int
    notes: tuple[str, ...]
    versions: dict[str, str]
    command: str

    @property
    def how(self) -> str:
        return self.combination + ("" if self.density is None else f", density {self.density:g}")

    def added(self, part: Part) -> str:
        """Return the size of what training added, for people."""
        return f"{part.added / self.start_size:.3f} of the start" if self.start_size else f"{part.added:.4g}"


def write_combined_card(directory: Path, report: Combined) -> None:
    """Write README.md."""
    (directory / CARD_NAME).write_text(combined_card(report), encoding="utf-8")


def combined_card(report: Combined) -> str:
    """Return what README.md beside the adapter says."""
    front = {"base_model": report.base} if is_hub_id(report.base) else {}
    rows = [[part.name, f"{part.weight:g}", report.added(part), f"`{part.sha256}`"] for part in report.parts]
    return TEMPLATE.format(
        front=yaml.safe_dump({**front, "library_name": "peft", "tags": ["lora", "qinit", "merge"]}, sort_keys=False),
        count=len(report.parts),
        base=report.base,
        how=report.how,
        start=STARTED if report.start else WHOLE,
        parts=table(["adapter", "weight", "added by training", "SHA-256"], rows),
        command=report.command,
    )
