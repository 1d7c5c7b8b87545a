"""Finished runs to polish further, and a short polish of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qinit.events import Progress
from qinit.runner.again import polish_run
from tests.qinit.runner.test_calibrated import FEW

TEXT = {"calibration": "random", "calibration_samples": 32, "calibration_length": 32}
SHORT = {**TEXT, "steps": 5, "check": False}
KINDS = {
    "packed": {**FEW},
    "dense": {**FEW, "format": "dense", "max_shard_size": "40KB"},
    "data-free": {"calibration": "none", "use_rslora": True, "lora_alpha": 7.0},
    "mixed": {**FEW, "ratio": 0.5},
    "ranks": {**FEW, "ratio": 0.5, "rank_budget": "30KB", "format": "gptq"},
    "polished before": {**TEXT, "polish": 2},
    "of weights alone": {"method": "loftq", "format": "dense"},
}


def polished(directory: Path, out: Path | None = None, **options: Any) -> Any:
    """Polish a run; returns its last event."""
    *_, last = polish_run(directory, out, command="qinit polish", **{**SHORT, **options})
    return last


def give_up(run: Path, out: Path | None = None) -> None:
    """Begin a polish and leave it unfinished."""
    events = polish_run(run, out, command="qinit polish", **SHORT)
    for event in events:
        if isinstance(event, Progress):
            events.close()
