"""A model of three layers, a little data, and short trainings of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers import random_samples

PLAIN = {"spiking": False, "layer_wise": "all"}


def base(seed: int = 0, **overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.models import GATED

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**GATED, "num_hidden_layers": 3, **overrides}))


def config(**options: Any) -> Any:
    from qinit.snndlft import SnnDlftConfig

    return SnnDlftConfig(**{"target_r": 2, "init_r": 4, **options})


def adapted(options: Any) -> Any:
    from qinit.snndlft import adapt

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return adapt(base(), options, "CAUSAL_LM")


def examples() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in random_samples(16, 8).tokens]


def trained(options: Any, place: Path, *, steps: int = 6, resume: Path | None = None, callbacks: Any = ()) -> Any:
    """Train a model for some steps of 4 x 8 tokens, with a checkpoint halfway; returns it and the callback."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from qinit.snndlft import DynamicLayers

    model, callback = adapted(options), DynamicLayers(options)
    arguments = TrainingArguments(
        str(place), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_steps=steps // 2, save_total_limit=2, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples(), callbacks=[callback, *callbacks])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, callback


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=random_samples(2, 8, seed=5).tokens).logits
