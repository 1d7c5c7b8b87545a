"""Tiny runs of every kind, and how to damage a copy of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qinit.files.manifest import write_manifest
from qinit.verification.findings import Finding
from qinit.verification.verify import verify
from tests.helpers import quantize
from tests.models import make_checkpoint

# name: family, options of the source, options of the run
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gptq": ("llama", {}, {"format": "gptq", "bits": 3, "group_size": 32}),
    "dense": (
        "llama",
        {},
        {
            **{"format": "dense", "max_shard_size": "100KB", "lora_alpha": 10, "use_rslora": True},
            **{"calibration": "random", "calibration_samples": 4, "calibration_length": 16},
        },
    ),
    "mixed": ("llama", {"tie_word_embeddings": True}, {"format": "gptq", "group_size": 32, "ratio": 0.5, "rank": 40}),
    "head": (
        *("llama", {"model_class": "LlamaForSequenceClassification", "num_labels": 32}),
        {"format": "gptq", "group_size": 32},
    ),
    "kept": ("gpt2", {"model_class": "GPT2Model"}, {"format": "gptq", "group_size": 32}),  # no prefix; Conv1D
}


def make_run(kind: str, place: Path) -> tuple[Path, Path]:
    """Make a run of this kind and its source below `place`; returns both directories."""
    family, source_options, options = KINDS[kind]
    source, run = make_checkpoint(place / "source", family, **source_options), place / "run"
    if "ratio" in options:
        options = {**options, "allocation": "random"}
    quantize(source, run, **options)
    return source, run


def problems(run: Path, source: Path | None = None) -> list[Finding]:
    """Return what a verification finds wrong."""
    return [each for each in verify(run, source) if isinstance(each, Finding) and each.grave]


def vouched(run: Path, source: Path | None = None) -> list[str]:
    """Write the sums anew, so that hashes find nothing; returns what else is found, in words."""
    write_manifest(run)
    return [str(each) for each in problems(run, source)]
