"""Which part of a model reads text, where others see or hear beside it."""

from __future__ import annotations

from typing import Any


def language_part(model: Any) -> str:
    """Return the dotted name of a model's text decoder, "" for a model that is nothing else.

    That is what the model's own `get_decoder` gives, where its configuration has one for text inside, and it predicts
    tokens: two towers side by side (CLIP) have no part that is more theirs, an encoder and its decoder are one.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        return ""
    try:
        decoder = model.get_decoder()
        apart = config.get_text_config() is not config
    except Exception:  # models that are made otherwise, code of a checkpoint's
        return ""
    names = (name for name, module in model.named_modules() if module is decoder)
    return next(names, "") if apart else ""
