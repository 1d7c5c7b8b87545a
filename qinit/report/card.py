"""The model card: README.md of a run's directory, with YAML front matter as the Hub reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from qinit.adapters import ADAPTER_DIRECTORY
from qinit.formats import FORMATS, READERS
from qinit.plan.shares import weight_words
from qinit.report.adapter_card import ADAPTER_TEMPLATE, MEASURED, adapter_snippet, is_adapter
from qinit.report.calls import from_pretrained, own_code
from qinit.report.check import check_words
from qinit.report.lead import lead
from qinit.report.report import Report
from qinit.source.demo import DEMO_NAME

CARD_NAME = "README.md"
# The lines of `load_snippet` for the run's own directory, by this qinit or an earlier one, which named other classes.
OWN_LINES = re.compile(
    r"^from transformers import (\w+); from peft import PeftModel\n"
    r'base = \1\.from_pretrained\("\.", dtype="auto"(?:, trust_remote_code=True)?\)\n'
    rf'model = PeftModel\.from_pretrained\(base, "\.", subfolder="{ADAPTER_DIRECTORY}", is_trainable=True\)$'
    r'|^import qinit\nmodel = qinit\.load\("\.", trainable=True(?:, trust_remote_code=True)?\)$',
    re.MULTILINE,
)
OWN_START = re.compile(
    rf" of rank \d+ in `{ADAPTER_DIRECTORY}/` that already repairs the quantization: fine-tuning starts from both"
)
TRAINED_DIRECTORY = "adapter"  # of a repository on the Hub, where a trained adapter is in the place of the run's own
TRAINED_WORDS = f"""\
The adapter in `{TRAINED_DIRECTORY}/` was trained, starting from the one that qinit made. What is under Measured, and in
`qinit.json`, is said of that start, which is not in this repository.
"""

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
TEMPLATE = """\
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
| {done} layers | {layers} ({kept} kept as they are) |
{weights}| bits per weight as stored | {bpw:.3f} |
| weights on disk | {before:.1f} MB before, {base:.1f} MB base + {adapter_mb:.1f} MB adapter after |
"""


def load_snippet(
    loader: str,
    place: str,
    *,
    packed_mixed: bool = False,
    on_hub: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    trained: bool = False,
) -> list[str]:
    """Return the lines of Python that load base and adapter for training from `place`, a directory or a Hub id (with
    its `revision`), by the class `loader` of transformers; stock transformers reads no `packed_mixed` widths. A
    `trained` adapter is loaded to be used."""
    trusted = own_code(trust_remote_code)
    quoted = json.dumps(place, ensure_ascii=False)  # quotes and backslashes as Python reads them
    at = quoted + (f", revision={json.dumps(revision)}" if revision else "")
    if trained:
        own = from_pretrained(loader, at, trust_remote_code)
        mixed = f"qinit.load(snapshot_download({at}), adapter=False{trusted})"
        imports = "import qinit; from huggingface_hub import snapshot_download"
        return [
            f"{imports if packed_mixed else f'from transformers import {loader}'}; from peft import PeftModel",
            f"base = {mixed if packed_mixed else own}",
            f'model = PeftModel.from_pretrained(base, {at}, subfolder="{TRAINED_DIRECTORY}")',
        ]
    if packed_mixed:
        if on_hub:
            lines = ["import qinit; from huggingface_hub import snapshot_download"]
            return [*lines, f"model = qinit.load(snapshot_download({at}), trainable=True{trusted})"]
        return ["import qinit", f"model = qinit.load({quoted}, trainable=True{trusted})"]
    return [
        f"from transformers import {loader}; from peft import PeftModel",
        f"base = {from_pretrained(loader, at, trust_remote_code)}",
        f'model = PeftModel.from_pretrained(base, {at}, subfolder="{ADAPTER_DIRECTORY}", is_trainable=True)',
    ]


def snippet_of(
    report: Report, place: str, *, on_hub: bool = False, revision: str | None = None, trained: bool = False
) -> list[str]:
    """Return `load_snippet` for what a run has written, or for its base with an adapter that was trained."""
    if is_adapter(report):
        return adapter_snippet(report, place)
    return load_snippet(
        report.loader,
        place,
        packed_mixed=packed_mixed(report),
        on_hub=on_hub,
        revision=revision,
        trust_remote_code=bool(report.recipe.get("trust_remote_code")),
        trained=trained,
    )


def packed_mixed(report: Report) -> bool:
    """Whether a run has packed weights of several widths or group sizes, which no stock loader reads."""
    grids = {(row.bits, row.group_size) for row in report.layers if row.bits}
    return not FORMATS[report.recipe["format"]].mixed_bits and len(grids) > 1


def hub_card(text: str, report: Report, repo_id: str, *, trained: bool = False) -> str:
    """Return a run's card as it stands on the Hub: it loads from `repo_id`, and names only a base model that is there.
    With a `trained` adapter in the place of the run's own it says so.

    All else is kept, also what a person wrote into it.
    """
    lines = "\n".join(snippet_of(report, repo_id, on_hub=True, trained=trained))
    text, replaced = OWN_LINES.subn(lambda _: lines, text)
    if trained:
        text = OWN_START.sub(f" in `{TRAINED_DIRECTORY}/` that was trained", text)
        load = "" if replaced else f"```python\n{lines}\n```\n"
        text = with_section(text, "## Trained\n", [*TRAINED_WORDS.split("\n"), *load.splitlines()])
    return with_hub_base(text)


def with_hub_base(text: str) -> str:
    """Return a card whose front matter names a base model only if that is on the Hub, and as what was quantized."""

    def named(metadata: dict[str, Any]) -> dict[str, Any]:
        base = metadata.get("base_model")
        return {"base_model": base, "base_model_relation": "quantized"} if is_hub_id(base) else {}

    return with_base(text, named)


def with_base(text: str, named: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """Return a card whose front matter begins with what is `named` of its metadata, in the place of what it says of a
    base model."""
    before, start, rest = text.partition("---\n")
    front, end, body = rest.partition("---\n")
    try:
        metadata = yaml.safe_load(front)
    except yaml.YAMLError:
        return text  # the Hub says what is wrong with it
    if before or not end or not isinstance(metadata, dict):
        return text
    found = named(metadata)
    others = {key: value for key, value in metadata.items() if key not in ("base_model", "base_model_relation")}
    metadata = {**found, **others}
    return start + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + end + body


def is_hub_id(model: object) -> bool:
    """Whether a card's base model was read from the Hub: the name has the form, and is neither the demo's nor a path's
    here."""
    named = isinstance(model, str) and model != DEMO_NAME and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model)
    return bool(named) and not Path(str(model)).exists()


def weight_rows(report: Report) -> dict[str, str]:
    """Return the table's rows on what is quantized; none for a run by an older qinit, which does not say."""
    totals = report.totals
    if "left" not in totals:
        return {}
    return weight_words(totals["quantized_weights"], totals["weights"], totals["left"], report.done)


def measured_rows(totals: dict[str, Any]) -> dict[str, str]:
    """Return the table's rows that not every run has."""
    rows = check_words(totals["check"]) if "check" in totals else {}
    if "output_error" in totals:
        rows["relative output error, base alone"] = f"{totals['output_error_start']:.4f}"
        rows["relative output error, base + adapter"] = f"{totals['output_error']:.4f}"
    if "calibration" in totals:
        rows |= calibration_words(totals["calibration"])
    return rows


def calibration_words(calibration: dict[str, Any]) -> dict[str, str]:
    """Return a table's rows on the text that a run was measured on and on its polish, from that part of a report."""
    rows = {}
    if "text" in calibration:  # a run without data that was polished later has none
        rows["calibrated on"] = calibration["text"]
    if "polish" in calibration:
        rows["polish"] = polish_words(calibration["polish"])
    return rows


def polish_words(result: dict[str, Any]) -> str:
    """Say what the polish did, from its part of the report; each on what text where a run was polished further."""
    further = "earlier" in result
    return "; then ".join(_one_polish(each, on_text=further) for each in (*(result.get("earlier") or []), result))


def _one_polish(result: dict[str, Any], *, on_text: bool) -> str:
    steps = f"{result['steps']} steps" + (f" on {result['text']}" if on_text and "text" in result else "")
    losses = f"held-out loss {result['held_out_before']:.4f} -> {result['held_out_after']:.4f}"
    return f"{steps}, {losses}" if result["kept"] else f"{steps}, nothing gained"


def write_card(directory: Path, report: Report, source: dict[str, Any]) -> None:
    """Write README.md into a run's directory; `source` is the metadata of the source's own card."""
    (directory / CARD_NAME).write_text(card_text(report, source), encoding="utf-8")


def card_text(report: Report, source: dict[str, Any]) -> str:
    """Return what README.md of a run says; `source` is the metadata of the source's own card."""
    base = report.totals["base"] if is_adapter(report) else {"name": report.model, "form": report.recipe["format"]}
    front = front_matter(report, source, "peft", [base["form"]], base["name"])
    totals = report.totals
    title = f"{report.model.rstrip('/').split('/')[-1]}, {totals['nominal_bits']:g} bits, rank {report.recipe['rank']}"
    notes = "".join(f"\n- {note}" for note in report.notes)
    packages = next((each.packages for each in (*FORMATS.values(), *READERS) if each.name == base["form"]), ())
    requires = f"Needs `pip install {' '.join(packages)}` beside transformers and peft.\n" if packages else ""
    text = ((ADAPTER_TEMPLATE if is_adapter(report) else TEMPLATE) + MEASURED).format(
        lead=lead(report),
        done=report.done,
        front=yaml.safe_dump(front, sort_keys=False),
        title=title,
        snippet="\n".join(snippet_of(report, ".")),
        requires=requires,
        layers=totals["layers"],
        kept=totals["layers_kept"],
        weights="".join(f"| {what} | {value} |\n" for what, value in weight_rows(report).items()),
        bpw=totals["bits_per_weight"],
        before=totals["bytes_before"] / 1e6,
        base=totals["base_bytes"] / 1e6,
        adapter_mb=totals["adapter_bytes"] / 1e6,
        error_start=totals["error_start"],
        error=totals["error"],
        measured="".join(f"| {what} | {value} |\n" for what, value in measured_rows(totals).items()),
        notes=f"\nNotes:\n{notes}\n" if notes else "",
        recipe=yaml.safe_dump(report.recipe, sort_keys=False),
        command=report.command,
    )
    return with_evaluations(text, totals)


def front_matter(
    report: Report, source: dict[str, Any], library: str, tags: Sequence[str], base: str | None = None
) -> dict[str, Any]:
    """Return a card's metadata: the `library` that loads it, more `tags`, the `base` that it is made from (the run's
    source if left out), and what still holds of the `source`'s."""
    front: dict[str, Any] = {"base_model": base or report.model, "library_name": library}
    front["tags"] = ["qinit", report.method, "lora", f"{report.totals['nominal_bits']:g}-bit", *tags]
    return front | inherited(source)


def inherited(source: dict[str, Any]) -> dict[str, Any]:
    """Return what of the source's metadata holds for what is made of it."""
    return {key: source[key] for key in INHERITED if key in source}


def with_evaluations(card: str, totals: dict[str, Any]) -> str:
    """Return a card with sections on the evaluations in a report's totals, in the places of older ones if it has them;
    all else stays as it is."""
    card = with_section(card, "## Perplexity\n", _perplexities(totals.get("evaluations") or []))
    return with_section(card, "## Tasks\n", _tasks(totals.get("tasks") or {}))


def with_section(card: str, heading: str, body: list[str]) -> str:
    """Return a card with this section before the recipe, or in the place of the one of that heading; without a body,
    with none."""
    old = re.search(rf"^{heading}.*?(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    if old:
        card = card[: old.start()] + card[old.end() :]
    if not body:
        return card
    recipe = re.search(r"^## Recipe\n", card, re.MULTILINE)
    place = old.start() if old else recipe.start() if recipe else len(card)
    return f"{card[:place]}{heading}" + "".join(f"{line}\n" for line in body) + f"\n{card[place:]}"


def measured_words(row: dict[str, Any]) -> str:
    """Say how an evaluation was made, from its row."""
    kind = "that do not overlap, the first token of each given"
    if row["stride"] is not None:
        kind = f"that start {row['stride']} apart, each token predicted once, with {row['length'] - row['stride']} or "
        kind += "more before it"
    count = f"{row['windows']} {'window' if row['windows'] == 1 else 'windows'} of {row['length']} tokens"
    return f"{count} {kind}; {row['tokens']} tokens predicted; {row['joined']}; {row['special_tokens']}; {row['dtype']}"


def _perplexities(rows: list[dict[str, Any]]) -> list[str]:
    columns = ("text", "perplexity", "original", "KL, nats", "same top token", "measured on")
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return [*head, *(f"| {' | '.join(_cells(row))} |" for row in rows)] if rows else []


def _tasks(tasks: dict[str, dict[str, float]]) -> list[str]:
    head = ["| task | metric | value |", "|---|---|---|"]
    rows = [f"| {task} | {name} | {value:.4f} |" for task, found in tasks.items() for name, value in found.items()]
    return [*head, *rows] if rows else []


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(key: str, digits: int) -> str:
        return "-" if row.get(key) is None else f"{row[key]:.{digits}f}"

    figures = [cell("perplexity", 3), cell("reference_perplexity", 3), cell("kl", 4), cell("top1_agreement", 4)]
    return [str(row["text"]).replace("|", "\\|"), *figures, measured_words(row)]
