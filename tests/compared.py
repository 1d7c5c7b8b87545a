"""A small comparison of methods for tests: its texts, its options, and what it leaves in `out`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.models import words

TEXT = words(*(4 + i * 37 % 250 for i in range(400)))
TRAINING = words(*(4 + i * i % 97 for i in range(900)))
STARTS = (
    "--methods",
    "loftq,eqft:none",
    "--bits",
    2,
    "--rank",
    4,
    "--text",
    "test.txt",
    "--length",
    16,
    "--out",
    "out",
)
TUNING = ("--finetune", 2, "--train-text", "train.txt", "--train-length", 16, "--batch", 2)
TUNING = (*TUNING, "--learning-rates", "0.001,0.01", "--seeds", "0,1", "--micro-batch", 1)


def result() -> Any:
    """Return what `out/compare.json` holds."""
    return json.loads(Path("out/compare.json").read_text())


def cells() -> dict[str, tuple[bytes, int]]:
    """Return every cell's file with its contents and the time it was written."""
    files = sorted(Path("out/cells").glob("*/*.json"))
    return {str(path.relative_to("out/cells")): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
