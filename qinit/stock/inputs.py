"""Inputs that a model runs on: tokens, and for models that see or hear a picture or a sound, all drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qinit.source.vocabulary import Facts

TOKENS = 12
FRAMES = 16_000  # of a sound, where it is no spectrogram
CHOSEN = 200  # ids that tokens are drawn from


def possible_inputs(model: Any, directory: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what to try a model on, one sample each, what its class calls its main input first; the same each time."""
    config, main = model.config, str(getattr(model, "main_input_name", "input_ids"))
    generator = torch.Generator().manual_seed(0)
    text = _text(directory, config.to_dict(), generator)
    others = dict(_seen_and_heard(config, generator))
    decoder = {"decoder_input_ids": text["input_ids"]} if getattr(config, "is_encoder_decoder", False) else {}
    if main in others:
        yield {main: others[main], **decoder}
    if text:
        yield {**text, **decoder}
        for name, value in others.items():
            yield {**text, name: value, **decoder}
    for name, value in others.items():
        yield {name: value, **decoder}


def _text(directory: Path, config: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    facts = Facts.read(directory, config)
    if facts.vocabulary is None:
        return {}
    ids = [i for i in range(min(facts.vocabulary, CHOSEN + len(facts.special))) if i not in facts.special] or [0]
    drawn = torch.randint(len(ids), (1, facts.clip(TOKENS)), generator=generator)
    return {"input_ids": torch.tensor(ids)[drawn]}


def _seen_and_heard(config: Any, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield pictures and sounds of the sizes that the configuration names."""
    places = (config, getattr(config, "vision_config", None), getattr(config, "audio_config", None))
    for place in (each for each in places if each is not None):
        size, bins = getattr(place, "image_size", None), getattr(place, "num_mel_bins", None)
        if size is not None:
            height, width = size if isinstance(size, list | tuple) else (size, size)
            channels = getattr(place, "num_channels", 3)
            yield "pixel_values", torch.randn(1, channels, height, width, generator=generator)
        if bins is not None:
            frames = 2 * int(getattr(place, "max_source_positions", 512))
            yield "input_features", torch.randn(1, bins, frames, generator=generator)
    if getattr(config, "conv_stride", None) is not None:
        yield "input_values", torch.randn(1, FRAMES, generator=generator)
