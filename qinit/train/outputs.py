"""What of a model's outputs a polish looks at: the last hidden state and the next-token distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def observed(model: Any, run: Callable[[], Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call `run`, which runs the model, and return the last hidden state [batch, length, width] and the logits
    [batch, length, vocabulary], None for a model without a head."""
    head, seen = model.get_output_embeddings(), []
    if head is not None:
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        hook = model.base_model.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs[0]))
    try:
        outputs = run()
    finally:
        hook.remove()
    return seen[0], None if head is None else outputs.logits
