"""What a model is given to read a text."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def inputs_of(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Return the arguments with which a model reads tokens [batch, length] whose padding `mask` (int64) leaves out.

    An encoder-decoder gets the text twice: as it is, and to be written, each token after those before it, as it is
    trained to copy, to denoise or to translate.
    """
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if not reads_twice(model):
        return inputs
    return {**inputs, "decoder_input_ids": _shifted(model, tokens), "decoder_attention_mask": mask}


def reads_twice(model: Any) -> bool:
    """Whether a model is an encoder and a decoder; an encoder alone may have the configuration of both."""
    both = getattr(model.config, "is_encoder_decoder", False)
    return bool(both) and "decoder_input_ids" in inspect.signature(model.forward).parameters


def _shifted(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the tokens one place later, behind the one that the decoder starts with."""
    starts = (getattr(model.config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "eos", "pad"))
    start = next((token for token in starts if isinstance(token, int)), 0)
    return torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], dim=1)
