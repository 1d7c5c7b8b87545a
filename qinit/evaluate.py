"""Perplexity of a loaded model on a text."""

from __future__ import annotations

import math
from typing import Any

import torch

from qinit.errors import QinitError


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor, window: int = 512, batch_size: int = 8) -> float:
    """Return exp of the mean next-token loss over non-overlapping windows of `tokens` [n].

    The first token of each window is given, not predicted, as is usual in the quantization literature
    (GPTQ, arXiv:2210.17323, section 4). Raises QinitError for a text shorter than one window.
    """
    count = len(tokens) // window
    if count == 0:
        raise QinitError(f"the text has {len(tokens)} tokens, fewer than one window of {window}")
    total = 0.0
    training = model.training
    model.eval()
    for batch in tokens[: count * window].view(count, window).split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total += float(losses)
    model.train(training)
    return math.exp(total / (count * (window - 1)))
