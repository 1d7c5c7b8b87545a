"""What a model of a family is fed, and a loss for its head."""

from __future__ import annotations

from typing import Any

import torch

LENGTH, EOS = 12, 2


def inputs_of(model: Any, reads: str) -> dict[str, torch.Tensor]:
    """Return inputs for two samples: token ids below 200, which no special token has, with eos at the end, and what
    else the model reads."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 200, (2, LENGTH), generator=generator)
    tokens[:, -1] = EOS
    if reads == "audio":
        frames = 2 * config.max_source_positions
        sound = torch.randn(2, config.num_mel_bins, frames, generator=generator)
        return {"input_features": sound, "decoder_input_ids": tokens}
    found = {"input_ids": tokens} if reads in ("text", "both") else {}
    if reads in ("image", "both"):
        seen = getattr(config, "vision_config", config)
        found["pixel_values"] = torch.randn(2, 3, seen.image_size, seen.image_size, generator=generator)
    if config.is_encoder_decoder and not type(model).__name__.endswith("ForSequenceClassification"):
        found["decoder_input_ids"] = tokens[:, : LENGTH // 2]
    return found


def answers(outputs: Any) -> torch.Tensor:
    """Return what a model has made of its inputs, in one row of float32: every tensor of its outputs."""
    tensors = [value for key, value in outputs.items() if isinstance(value, torch.Tensor) and key != "loss"]
    return torch.cat([value.float().flatten() for value in tensors])


def loss_of(outputs: Any) -> torch.Tensor:
    """Return a loss that every output counts in: the mean square distance to random answers of the same size."""
    found = answers(outputs)
    wanted = torch.randn(len(found), generator=torch.Generator().manual_seed(1))
    return (found - wanted * found.detach().std()).square().mean()
