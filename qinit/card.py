"""The model card: README.md of a run's directory, with YAML front matter as the Hub reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qinit.adapter import ADAPTER_DIRECTORY
from qinit.report import Report

if TYPE_CHECKING:
    from qinit.plan import Plan

AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}

TEMPLATE = """\
---
{front}---

# {title}

`{model}` quantized to {bits} bits by qinit ({format}, {bpw:.2f} bits per quantized weight as stored), with a
LoRA adapter of rank {rank} in `{adapter}/` that already repairs the quantization: fine-tuning starts from both.

## Load
```python
{snippet}
```
{requires}
## Measured
| | |
|---|---|
| quantized layers | {layers} ({kept} kept as they are) |
| bits per weight as stored | {bpw:.3f} |
| weights on disk | {before:.1f} MB before, {base:.1f} MB base + {adapter_mb:.1f} MB adapter after |
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


def load_snippet(
    class_name: str, directory: str, *, packed_mixed: bool = False, trust_remote_code: bool = False
) -> list[str]:
    """Return the lines of Python that load base and adapter for training; stock transformers reads no `packed_mixed`
    widths."""
    trusted = ", trust_remote_code=True" if trust_remote_code else ""
    place = json.dumps(directory, ensure_ascii=False)  # quotes and backslashes as Python reads them
    if packed_mixed:
        return ["import qinit", f"model = qinit.load({place}, trainable=True{trusted})"]
    auto = next((auto for end, auto in AUTO_CLASSES.items() if class_name.endswith(end)), "AutoModel")
    return [
        f"from transformers import {auto}; from peft import PeftModel",
        f'base = {auto}.from_pretrained({place}, dtype="auto"{trusted})',
        f'model = PeftModel.from_pretrained(base, {place}, subfolder="{ADAPTER_DIRECTORY}", is_trainable=True)',
    ]


def snippet_of(report: Report, directory: str) -> list[str]:
    """Return `load_snippet` for what a run has written."""
    trusted = bool(report.recipe.get("trust_remote_code"))
    return load_snippet(
        str(report.source["class"]), directory, packed_mixed=packed_mixed(report), trust_remote_code=trusted
    )


def packed_mixed(report: Report) -> bool:
    """Whether a run has packed weights of several widths."""
    return report.recipe["format"] == "gptq" and len({row.bits for row in report.layers if row.bits}) > 1


def _measured(totals: dict[str, Any]) -> dict[str, str]:
    """Return the table's rows that only a calibrated run has."""
    rows = {}
    if "output_error" in totals:
        rows["relative output error, base alone"] = f"{totals['output_error_start']:.4f}"
        rows["relative output error, base + adapter"] = f"{totals['output_error']:.4f}"
    if "calibration" in totals:
        rows["calibrated on"] = totals["calibration"]["text"]
        if "polish" in totals["calibration"]:
            rows["polish"] = polish_words(totals["calibration"]["polish"])
    return rows


def polish_words(result: dict[str, Any]) -> str:
    """Say what the polish did, from its part of the report."""
    losses = f"held-out loss {result['held_out_before']:.4f} -> {result['held_out_after']:.4f}"
    return f"{result['steps']} steps, {losses}" if result["kept"] else f"{result['steps']} steps, nothing gained"


def write_card(directory: Path, report: Report, plan: Plan) -> None:
    """Write README.md into a run's directory."""
    source = plan.checkpoint.card_metadata()
    front: dict[str, Any] = {"base_model": report.model, "library_name": "peft"}
    front["tags"] = [
        "qinit",
        report.method,
        "lora",
        f"{report.totals['nominal_bits']:g}-bit",
        report.recipe["format"],
    ]
    for key in ("license", "license_name", "license_link", "language", "pipeline_tag"):
        if key in source:
            front[key] = source[key]
    totals = report.totals
    title = f"{report.model.rstrip('/').split('/')[-1]}, {totals['nominal_bits']:g} bits, rank {report.recipe['rank']}"
    notes = "".join(f"\n- {note}" for note in report.notes)
    requires = "Needs `pip install gptqmodel optimum` beside transformers and peft.\n"
    text = TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=title,
        model=report.model,
        bits=f"{totals['nominal_bits']:g}",
        format=report.recipe["format"],
        rank=report.recipe["rank"],
        adapter=ADAPTER_DIRECTORY,
        snippet="\n".join(snippet_of(report, ".")),
        requires=requires if report.recipe["format"] == "gptq" else "",
        layers=totals["layers"],
        kept=totals["layers_kept"],
        bpw=totals["bits_per_weight"],
        before=totals["bytes_before"] / 1e6,
        base=totals["base_bytes"] / 1e6,
        adapter_mb=totals["adapter_bytes"] / 1e6,
        error_start=totals["error_start"],
        error=totals["error"],
        measured="".join(f"| {what} | {value} |\n" for what, value in _measured(totals).items()),
        notes=f"\nNotes:\n{notes}\n" if notes else "",
        recipe=yaml.safe_dump(report.recipe, sort_keys=False),
        command=report.command,
    )
    (directory / "README.md").write_text(text, encoding="utf-8")
