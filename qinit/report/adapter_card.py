"""What the card of an adapter says that was made for a base which exists."""

from __future__ import annotations

import json
from pathlib import Path

from qinit.errors import ReportError
from qinit.formats import READERS
from qinit.report.calls import from_pretrained
from qinit.report.report import Report

MEASURED = """\
| relative weight error, base alone | {error_start:.4f} |
| relative weight error, base + adapter | {error:.4f} |
{measured}{notes}
## Recipe
```yaml
{recipe}```
Command:
```
{command}
```
Per-layer figures, versions and the full recipe are in `qinit.json`.
"""

ADAPTER_TEMPLATE = """\
---
{front}---

# {title}

{lead}

## Load
```python
{snippet}
```
{requires}
## Measured
| | |
|---|---|
| {done} layers | {layers} ({kept} that the base has not quantized) |
{weights}| bits per weight as stored | {bpw:.3f} |
| weights on disk | {base:.1f} MB base (there already) + {adapter_mb:.1f} MB adapter |
"""


def is_adapter(report: Report) -> bool:
    """Whether a report is that of an adapter alone, for a base that was there."""
    return report.recipe.get("base") is not None


def require_base(report: Report, directory: Path, advice: str) -> None:
    """Raise ReportError for a directory that holds an adapter alone, with the `advice` on what to do with one."""
    if is_adapter(report):
        raise ReportError(f"{directory}: holds an adapter alone, for the base {report.recipe['base']}; {advice}")


def adapter_snippet(report: Report, place: str, *, revision: str | None = None, trained: bool = False) -> list[str]:
    """Return the lines of Python that load the base and the adapter that lies in `place`, a directory or a Hub id (with
    its `revision`), for training; a `trained` one to be used."""
    base, adapter = (json.dumps(each, ensure_ascii=False) for each in (report.totals["base"]["name"], place))
    adapter += f", revision={json.dumps(revision)}" if revision else ""
    form = report.totals["base"]["form"]
    return [
        f"from transformers import {report.loader}; from peft import PeftModel",
        f"base = {from_pretrained(report.loader, base, bool(report.recipe.get('trust_remote_code')))}",
        *(each.opening for each in READERS if each.name == form and each.opening),
        f"model = PeftModel.from_pretrained(base, {adapter}{'' if trained else ', is_trainable=True'})",
    ]
