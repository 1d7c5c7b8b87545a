"""The tokens that calibration runs the model on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# What of a batch goes through the model at once, given the samples that should: fewer where memory is short.
Portion = Callable[[int], int]


@dataclass(frozen=True)
class Samples:
    """Token ids [samples, length] (int64); `mask` [samples, length] (bool) is False where a sample is padded,
    None when nothing is. `origin` says in words where they come from, for the report and the card."""

    tokens: torch.Tensor
    mask: torch.Tensor | None
    origin: str
    numbers: tuple[int, ...] | None = None  # of the samples, where they are in another order than the text's

    @property
    def count(self) -> int:
        """Tokens that are no padding."""
        return self.tokens.numel() if self.mask is None else int(self.mask.sum())

    def shortest_first(self) -> Samples:
        """Return the same samples in the order of their lengths, so that batches have little padding."""
        if self.mask is None:
            return self
        order = self.mask.sum(1).argsort(stable=True)
        return Samples(self.tokens[order], self.mask[order], self.origin, tuple(order.tolist()))

    def number(self, place: int) -> int:
        """Return the number that a sample has in the text."""
        return place if self.numbers is None else self.numbers[place]
