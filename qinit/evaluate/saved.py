"""Figures in a run's directory: rows of `evaluations` in qinit.json, and the model card's table of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qinit.errors import OutputError
from qinit.evaluate.figures import Figures
from qinit.evaluate.job import Way
from qinit.evaluate.text import Text, Tokens
from qinit.evaluate.windows import Windows
from qinit.files.atomic import replace_text
from qinit.files.manifest import MANIFEST_NAME, read_manifest, refresh
from qinit.report.card import CARD_NAME, with_evaluations
from qinit.report.report import REPORT_NAME, Report
from qinit.source.checkpoint import read_json

KEY = ("text", "length", "stride")  # a later evaluation that has these in common takes an older one's place


def row_of(
    text: Text, tokens: Tokens, windows: Windows, way: Way, figures: Figures, reference: str | None
) -> dict[str, Any]:
    """Return what is kept of an evaluation; losses and KL are in nats."""
    return {
        "text": text.name,
        "length": windows.length,
        "stride": windows.stride,
        "windows": len(windows),
        "tokens": figures.tokens,
        "joined": text.joined,
        "special_tokens": tokens.special,
        "perplexity": figures.perplexity,
        "loss": figures.loss,
        "reference": reference,
        "reference_perplexity": figures.reference_perplexity,
        "kl": figures.kl,
        "top1_agreement": figures.agreement,
        "dtype": way.dtype,
        "streamed": way.streamed,
    }


def check_savable(directory: Path) -> None:
    """Raise what `save` would, before the long work: ReportError for damage, OutputError for no right to write."""
    Report.read(directory)
    if (directory / MANIFEST_NAME).is_file():
        read_manifest(directory)
    if not os.access(directory, os.W_OK):
        raise OutputError(f"{directory}: cannot be written to; --no-save leaves the run as it is")


def save(directory: Path, row: dict[str, Any] | None, tasks: dict[str, dict[str, float]]) -> list[str]:
    """Put a row among the run's evaluations, or in the place of one of the same text, length and stride, and tasks' own
    results beside them; returns the names of the files that were written. Raises ReportError and OutputError."""
    check_savable(directory)
    raw = read_json(directory / REPORT_NAME, "")  # and not the report, which passes over what a later qinit wrote
    totals = raw["totals"]
    if row is not None:
        same = [row[key] for key in KEY]
        others = [one for one in totals.get("evaluations") or [] if [one.get(key) for key in KEY] != same]
        totals["evaluations"] = [*others, row]
    if tasks:
        totals["tasks"] = {**(totals.get("tasks") or {}), **tasks}
    replace_text(directory / REPORT_NAME, json.dumps(raw, indent=2) + "\n")
    written = [REPORT_NAME]
    card = directory / CARD_NAME
    if card.is_file():  # who removed it wants none
        replace_text(card, with_evaluations(card.read_text(encoding="utf-8"), totals))
        written.append(CARD_NAME)
    refresh(directory, written)
    return written
