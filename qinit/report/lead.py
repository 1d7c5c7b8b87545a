"""What a card says first: what was made of which model, and where the adapter is."""

from __future__ import annotations

from qinit.adapters import ADAPTER_DIRECTORY
from qinit.report.report import Report

QUANTIZED = """\
`{model}` quantized to {bits:g} bits by qinit ({format}, {bpw:.2f} bits per quantized weight as stored), with a
LoRA adapter of rank {rank} in `{adapter}/` that already repairs the quantization: fine-tuning starts from both."""
STARTED = """\
`{model}` with a part of its weights in a LoRA adapter of rank {rank} in `{adapter}/`, by qinit: the start {method}.
Fine-tuning starts from both."""
ROUNDED = """\
`{model}` quantized to {bits:g} bits by qinit ({format}, {bpw:.2f} bits per quantized weight as stored), with a
LoRA adapter of rank {rank} in `{adapter}/`, the start {method} of full precision: fine-tuning starts from both."""
REPAIRED = """\
An adapter of rank {rank} by qinit that repairs `{base}` ({form}, {bpw:.2f} bits per quantized weight as stored)
towards `{model}`, which it was quantized from: fine-tuning starts from both. The base itself is not in here."""
ALONE = """\
An adapter of rank {rank} by qinit for `{base}`, the start {method}: it changes nothing before it is trained. The base
itself is not in here."""


def lead(report: Report) -> str:
    """Return the first paragraph of a run's card."""
    totals, recipe = report.totals, report.recipe
    base = totals.get("base") or {"name": "", "form": ""}
    if recipe.get("base") is not None:
        text = ALONE if recipe["base"] == recipe.get("model") else REPAIRED
    elif report.start:
        text = STARTED if recipe["bits"] == 16 else ROUNDED
    else:
        text = QUANTIZED
    return text.format(
        model=report.model,
        bits=totals["nominal_bits"],
        format=recipe["format"],
        bpw=totals["bits_per_weight"],
        rank=recipe["rank"],
        adapter=ADAPTER_DIRECTORY,
        method=report.method,
        base=base["name"],
        form=base["form"],
    )
