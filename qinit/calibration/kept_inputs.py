"""What the groups of a block have read in the original model, kept until the repaired one has come so far."""

from __future__ import annotations

from pathlib import Path

import torch

from qinit.calibration.groups import Group, Groups
from qinit.stream.carried import Batch
from qinit.stream.shelf import Shelf


class KeptInputs:
    """The inputs of a block's groups, of all but the first, whose input is computed anew; and what a group's output is
    added to, where that is what another group reads. `tokens` is how many the text has, padding included; `directory`
    is for what memory does not hold."""

    def __init__(self, directory: Path, tokens: int, device: torch.device) -> None:
        self.directory, self.tokens, self.device = directory, tokens, device
        self.shelf: Shelf | None = None

    def put(
        self, groups: Groups, group: Group, batch: Batch, x: torch.Tensor, added_to: torch.Tensor | None = None
    ) -> None:
        """Keep what a group reads in a batch, and what its output is `added_to`."""
        if self.shelf is None:
            self.shelf = Shelf(self.directory, 4 * self._width(groups) * self.tokens, self.device)
        self.shelf.put(group.inner, batch.start, x)
        if added_to is not None:
            self.shelf.put(f"{group.inner}+", batch.start, added_to)

    def take(self, group: Group, batch: Batch) -> torch.Tensor | None:
        """Return what a group has read in a batch, and forget it; None if it was not kept."""
        return None if self.shelf is None else self.shelf.take(group.inner, batch.start)

    def take_start(self, group: Group, batch: Batch) -> torch.Tensor | None:
        """The same of what the group's output is added to."""
        return None if self.shelf is None else self.shelf.take(f"{group.inner}+", batch.start)

    @staticmethod
    def _width(groups: Groups) -> int:
        """Return how many numbers are kept of a token, at most."""
        linear = [group for group in groups.found if group.stack is None]
        kept = [group for number, group in enumerate(linear) if number or group is linear[-1]]
        sizes = [group.layers[0].target.module for group in kept]
        width = sum(size.in_features for size in sizes)
        return width + sum(size.out_features for size, group in zip(sizes, kept, strict=True) if group.reader)
