"""What a comparison leaves: compare.json, and the same as Markdown, a picture and a page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qinit.compare.comparison import Comparison
from qinit.compare.make import RESULT_NAME
from qinit.compare.pictures import page, png
from qinit.compare.schedule import Found
from qinit.compare.table import document, rows
from qinit.errors import ReportError
from qinit.files.atomic import write_files
from qinit.machine import ran_on, versions


def result(comparison: Comparison, found: Found, command: str) -> dict[str, Any]:
    """Return the whole result, as compare.json holds it."""
    learn, validation = comparison.learn, comparison.validation
    return {
        "kind": "compare",
        "command": command,
        "versions": versions(),
        "machine": ran_on(),
        "device": comparison.device,
        "model": comparison.model,
        "fingerprint": comparison.fingerprint,
        "rank": next((row.recipe.rank for row in comparison.rows if row.recipe), None),
        "texts": [{"name": text.name, "tokens": len(text.ids), "digest": text.digest} for text in comparison.texts],
        "window": comparison.window,
        "training": asdict(comparison.training) if comparison.training else None,
        "learn": {"name": learn.name, "tokens": len(learn.ids), "digest": learn.digest} if learn else None,
        "validation_tokens": len(validation.ids) if validation else None,
        "seeds": list(comparison.seeds),
        "rows": rows(comparison, found),
    }


def write_result(directory: Path, value: dict[str, Any], *, pictures: bool = False) -> list[Path]:
    """Write compare.json and, with `pictures`, compare.md, compare.png and compare.html, each under a temporary name
    first; returns what was written. Without matplotlib or plotly their file is left out."""
    contents = {RESULT_NAME: (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()}
    if pictures:
        contents["compare.md"] = document(value).encode()
        for name, draw in (("compare.png", png), ("compare.html", page)):
            try:
                contents[name] = draw(value)
            except ReportError:  # its package is not installed
                continue
    return write_files(directory, contents)
