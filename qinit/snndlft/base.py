"""The base that is trained on: a checkpoint or a run of qinit, for language modelling or with a new classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.loading import load_base
from qinit.snndlft.layers import BLOCK
from qinit.source.checkpoint import read_json
from qinit.source.skeleton import loader
from qinit.source.vocabulary import CAUSAL_ENDINGS, Facts

CLASSIFIER = "AutoModelForSequenceClassification"


def load_for_training(
    directory: Path,
    classes: Sequence[str] | None,
    device: torch.device,
    *,
    dtype: Any = None,
    trust_remote_code: bool = False,
) -> tuple[Any, list[str]]:
    """Load the base alone, of a run of qinit without its adapter, as a language model (`classes` None) or a classifier;
    returns it and the modules that the checkpoint has no weights for, which are random. Without `dtype`, on a CPU in
    float32, elsewhere in the checkpoint's. Raises CheckpointError."""
    config = read_json(directory / "config.json", "a model directory has one; is this the right directory?")
    by_device = torch.float32 if device.type == "cpu" else "auto"
    options: dict[str, Any] = {"dtype": dtype or by_device, "device": device, "trust_remote_code": trust_remote_code}
    if classes is None:
        facts = Facts.read(directory, config, trust_remote_code)
        if not facts.causal:
            raise CheckpointError(
                f"{facts.config_file}: language modelling needs a causal language model (an architecture that ends in "
                f"{' or '.join(CAUSAL_ENDINGS)}), found {facts.architecture}; --label trains a classifier"
            )
        class_name = loader(config, trust_remote_code).__name__
    else:
        class_name = CLASSIFIER
        options["id2label"] = dict(enumerate(classes))
        options["label2id"] = {name: number for number, name in enumerate(classes)}
    model, info = load_base(directory, class_name, config, **options)
    new = sorted({name.rpartition(".")[0] for name in info["missing_keys"]})
    lost = [name for name in new if classes is None or BLOCK.match(name)]
    if lost:
        raise CheckpointError(f"{directory}: lacks the weights of {len(lost)} modules ({', '.join(lost[:3])})")
    return model, new
