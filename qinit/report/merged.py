"""The report of a merge, kept as qinit.json like a run's and told from one by its `kind`, and its model card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from qinit.errors import ReportError
from qinit.files.reading import read_regular
from qinit.formats import FORMATS
from qinit.report.calls import from_pretrained
from qinit.report.card import CARD_NAME, inherited, is_hub_id
from qinit.report.report import REPORT_BYTES, REPORT_NAME, Measure, Size, first_wrong, kind_of_report

TEMPLATE = """\
---
{front}---

# {title}

`{model}` as one ordinary model, merged by qinit: W' = Q + s·B·A, where Q is the base that qinit quantized to
{bits:g} bits and s·B·A the adapter that {adapter}. {stored}

## Load
```python
{snippet}
```
{requires}
## Merged
| | |
|---|---|
| parameters that the adapter changes | {changed} |
| how | {how} |
| change, relative to Q | {change:.4f} |
| lost by rounding to {dtype}, relative to W' | {rounding:.2e} |
| weights on disk | {megabytes:.1f} MB |
{requantized}{notes}
Command:
```
{command}
```
Every merged parameter, the sums of the run's base and of the adapter, and versions are in `qinit.json`.
"""
KINDS = {
    "merge": "What was never quantized and not trained is the original's.",
    "requantized": "These weights were then quantized anew, without an adapter.",
}


@dataclass(frozen=True)
class MergedRow:
    """A parameter, or an expert, that the adapter changes: `change` is |W' - Q| / |Q| (Frobenius norms), `rounding`
    what storing it loses, relative to |W'|."""

    name: str
    shape: tuple[Size, ...]
    how: str
    change: Measure
    rounding: Measure


@dataclass(frozen=True)
class MergeReport:
    """What was merged: `run` and `adapter` are the SHA-256 sums of the run's SHA256SUMS and of the adapter's weights.
    `requantized` is what quantizing anew has come to, None where that was not asked for."""

    kind: Literal["merge"]
    model: str
    command: str
    source: dict[str, Any]
    run: dict[str, Any]
    adapter: dict[str, Any]
    dtype: str | None
    versions: dict[str, str]
    totals: dict[str, Any]
    notes: tuple[str, ...]
    merged: Annotated[tuple[MergedRow, ...], Field(min_length=1)]
    requantized: dict[str, Any] | None = None

    @property
    def method(self) -> str:
        """What made it, in a word."""
        return "requantize" if self.requantized else "merge"

    @property
    def loader(self) -> str:
        """The name of the transformers class that loads it."""
        return str(self.source.get("loader") or self.source["class"])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def write(self, directory: Path) -> None:
        (directory / REPORT_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> MergeReport:
        """Read the report in a merge's directory; keys of a later qinit are passed over. Raises ReportError."""
        from pydantic import TypeAdapter, ValidationError

        path = directory / REPORT_NAME
        try:
            return TypeAdapter(cls).validate_json(read_regular(path, REPORT_BYTES), strict=True)
        except OSError as error:
            raise ReportError(f"{path}: cannot be read ({error.strerror}); pass what `qinit merge` wrote") from None
        except ValidationError as error:
            raise ReportError(f"{path}: not the report of a merge ({first_wrong(error)})") from None


def is_merge(directory: Path) -> bool:
    """Whether a directory says of itself that it is a merge."""
    return kind_of_report(directory) == "merge"


def merged_snippet(report: MergeReport, place: str, revision: str | None = None) -> list[str]:
    """Return the lines of Python that load a merge from a directory or a Hub id."""
    at = json.dumps(place, ensure_ascii=False) + (f", revision={json.dumps(revision)}" if revision else "")
    call = from_pretrained(report.loader, at, bool(report.source.get("trust_remote_code")))
    return [f"from transformers import {report.loader}", f"model = {call}"]


def write_merged_card(directory: Path, report: MergeReport, source: dict[str, Any]) -> None:
    """Write README.md; `source` is the metadata of the run's card."""
    (directory / CARD_NAME).write_text(merged_card(report, source), encoding="utf-8")


def on_hub(card: str, report: MergeReport, repo_id: str) -> str:
    """Return the card of a merge as it stands on the Hub: it loads from `repo_id`; all else is kept."""
    own, there = ("\n".join(merged_snippet(report, place)) for place in (".", repo_id))
    return card.replace(own, there)


def merged_card(report: MergeReport, source: dict[str, Any]) -> str:
    """Return what README.md of a merge says."""
    front: dict[str, Any] = {}
    if is_hub_id(report.model):
        front |= {"base_model": report.model, "base_model_relation": "finetune"}
    front |= {"library_name": "transformers", "tags": ["qinit", "merge"]}
    front |= inherited(source)
    totals, name = report.totals, report.model.rstrip("/").split("/")[-1]
    hows = list(dict.fromkeys(row.how for row in report.merged))
    how = "; ".join(hows[:3]) + (f" and {len(hows) - 3} more" if len(hows) > 3 else "")
    notes = "".join(f"\n- {note}" for note in report.notes)
    packages = FORMATS[report.requantized["format"]].packages if report.requantized else ()
    return TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"{name}, merged",
        model=report.model,
        bits=report.run["bits"],
        adapter="qinit made with it" if report.adapter["own"] else "was trained on it",
        stored=KINDS["requantized" if report.requantized else "merge"],
        snippet="\n".join(merged_snippet(report, ".")),
        requires=f"Needs `pip install {' '.join(packages)}` beside transformers.\n" if packages else "",
        changed=len(report.merged),
        how=how,
        change=totals["change"],
        dtype=", ".join(totals["dtypes"]),
        rounding=totals["rounding"],
        megabytes=totals["bytes"] / 1e6,
        requantized="".join(f"| {what} | {value} |\n" for what, value in requantized_words(report).items()),
        notes=notes,
        command=report.command,
    )


def requantized_words(report: MergeReport) -> dict[str, str]:
    """Return a table's rows on what quantizing anew has come to."""
    found = report.requantized
    if found is None:
        return {}
    rows = {
        "quantized anew": f"{found['bits']} bits, {found['format']}, {found['bits_per_weight']:.3f} bits per weight, "
        "no adapter",
        "relative weight error against the merged weights": f"{found['error']:.4f}",
    }
    if (check := found.get("check")) is not None:
        rows["KL from the merged model"] = f"{check['kl']:.4f} nats per token"
        rows["same top token"] = f"{100 * check['top1_agreement']:.1f} %"
        rows["perplexity"] = f"{check['perplexity']:.3f}, merged {check['reference_perplexity']:.3f}"
        rows["measured on"] = f"{check['tokens']} tokens of {check['text']}"
    return rows
