"""The source model as a whole, for what cannot be streamed."""

from __future__ import annotations

from typing import Any

import torch

from qinit.errors import CalibrationError
from qinit.plan.plan import Plan
from qinit.source.skeleton import loader
from qinit.stream.feeding import inputs_of
from qinit.stream.weights import ModelWeights


def read_tokens(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None, plan: Plan) -> Any:
    """Run the model on tokens [batch, length] and return its outputs. Raises CalibrationError if it cannot."""
    try:
        return model(**inputs_of(model, tokens, None if mask is None else mask.long()))
    except CalibrationError:
        raise
    except Exception as error:  # a model can ask for anything beside tokens
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"{plan.checkpoint.directory}: the model does not run on token ids ({type(error).__name__}: {reason}); "
            "use --calibration none"
        ) from error


def load_whole(plan: Plan) -> Any:
    """Load the source model in float32, to be used and not changed. Raises CalibrationError."""
    directory, trusted = plan.checkpoint.directory, plan.recipe.trust_remote_code
    try:
        model = loader(plan.checkpoint.config, trusted).from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trusted,
        )
    except Exception as error:  # a checkpoint can break its class in any way
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"{directory}: the model cannot be loaded whole for calibration ({type(error).__name__}: {reason}); "
            "use --calibration none"
        ) from None
    if plan.given is not None and plan.given.moved:
        weights = ModelWeights(plan.checkpoint, plan.architecture, trust_remote_code=trusted)
        for name in sorted(plan.given.moved):
            value = weights.read(name, torch.device("cpu"))
            assert value is not None
            model.get_parameter(name).data = value
    return model.eval()
