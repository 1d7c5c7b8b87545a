"""The tokens that calibration runs the model on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Samples:
    """Token ids [samples, length] (int64); `mask` [samples, length] (bool) is False where a sample is padded,
    None when nothing is. `origin` says in words where they come from, for the report and the card."""

    tokens: torch.Tensor
    mask: torch.Tensor | None
    origin: str

    @property
    def count(self) -> int:
        """Tokens that are no padding."""
        return self.tokens.numel() if self.mask is None else int(self.mask.sum())
