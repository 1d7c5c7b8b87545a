"""The model card of a training: README.md in its directory, with front matter as the Hub reads it."""

from __future__ import annotations

from typing import Any

import yaml

from qinit.report.card import is_hub_id
from qinit.snndlft.page import heading, summary
from qinit.snndlft.report import SnnReport
from qinit.snndlft.spikes import INSTALL

TEMPLATE = """\
---
{front}---

# {title}

{lead} The base itself is not in here.

## Load
```python
import qinit.snndlft
model = qinit.snndlft.load(".")
```
{needs}
## Measured
| | |
|---|---|
{rows}{notes}
Command:
```
{command}
```
Ranks, trained layers and spike rates by layer over time are in `qinit.json`, and drawn in `report.html`.
"""
SPIKING = (
    "An adapter for `{model}` that `qinit snndlft` trained: AdaLoRA between whose Q and P are spikes. It cannot be "
    "merged, and PEFT without qinit refuses it."
)
PLAIN = "An adapter for `{model}` that `qinit snndlft` trained: AdaLoRA, which stock PEFT loads and merges."


def card_text(report: SnnReport) -> str:
    """Return what README.md says."""
    task = "text-generation" if report.classes is None else "text-classification"
    kind = ["snn-dlft", "spiking"] if report.spiking else []
    front: dict[str, Any] = {"base_model": report.model} if is_hub_id(report.model) else {}
    front |= {"base_model_relation": "adapter"} if front else {}
    front |= {"library_name": "peft", "pipeline_tag": task, "tags": ["qinit", *kind, "adalora"]}
    return TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=heading(report),
        lead=(SPIKING if report.spiking else PLAIN).format(model=report.model),
        needs=f"Needs `{INSTALL}`.\n" if report.spiking else "",
        rows="".join(f"| {what} | {value} |\n" for what, value in summary(report).items()),
        notes="".join(f"\n- {note}" for note in report.notes) + ("\n" if report.notes else ""),
        command=report.command,
    )
