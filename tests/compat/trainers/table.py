"""Which trainers are run, with what installed, and on which formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qinit.trainers import TRAINERS, Trainer

# A CPU's types, and lengths that the few texts fill.
CHANGES = {"llama-factory": {"bf16": False, "cutoff_len": 32}, "axolotl": {"bf16": False, "sequence_len": 64}}


@dataclass(frozen=True)
class Row:
    """A trainer, the pip commands of its environment after torch's, and the formats that it takes. `changes` are made
    to what is written for it, beside those of every row. `unfit` are files and folders of packages that PyPI has
    for CUDA alone: beside a torch for CPUs they would fail while they are imported, and are emptied there."""

    name: str
    trainer: Trainer
    install: tuple[str, ...]
    formats: tuple[str, ...] = ("dense", "gptq")
    stages: tuple[str, ...] = ("",)  # LLaMA-Factory's; a packed base is tried in the first
    changes: Mapping[str, Any] = field(default_factory=dict)
    unfit: tuple[str, ...] = ()


def _row(name: str, **more: Any) -> Row:
    trainer = TRAINERS[name]
    commands = (*trainer.install, *trainer.packed_install)
    return Row(name, trainer, commands, changes=CHANGES.get(name, {}), **more)


CUDA_ONLY = ("torchvision/_meta_registrations.py", "torchaudio/lib")
OLD = "pip install transformers==4.57.6 peft==0.18.1 datasets==4.8.5"
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _row("transformers"),
        Row("transformers-4", TRAINERS["transformers"], (OLD,), formats=("dense",)),
        _row("trl"),
        _row("llama-factory", stages=("sft", "pt"), unfit=CUDA_ONLY),
        _row("axolotl"),
    )
}
