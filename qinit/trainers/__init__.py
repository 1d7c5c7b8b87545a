"""Trainers: what each of them needs to go on from a run with its start kept.

To add one: one file with a subclass of Trainer, one line in TRAINERS, and a page in docs/trainers.
"""

from __future__ import annotations

from qinit.trainers.axolotl import AxolotlTrainer
from qinit.trainers.base import TrainableRun, Trainer
from qinit.trainers.llama_factory import LlamaFactoryTrainer
from qinit.trainers.mlx_lm import MlxLmTrainer
from qinit.trainers.ms_swift import MsSwiftTrainer
from qinit.trainers.torchtune import TorchtuneTrainer
from qinit.trainers.transformers import TransformersTrainer
from qinit.trainers.trl import TrlTrainer
from qinit.trainers.unsloth import UnslothTrainer

TRAINERS: dict[str, Trainer] = {
    trainer.name: trainer
    for trainer in (
        TransformersTrainer(),
        TrlTrainer(),
        LlamaFactoryTrainer(),
        AxolotlTrainer(),
        UnslothTrainer(),
        MsSwiftTrainer(),
        TorchtuneTrainer(),
        MlxLmTrainer(),
    )
}

__all__ = ["TRAINERS", "TrainableRun", "Trainer"]
