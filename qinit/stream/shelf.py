"""What a block's layers have read, kept for a while: on the device, in memory, or on disk, by how much it is."""

from __future__ import annotations

from pathlib import Path

import torch

from qinit.stream.carried import place_for


class Shelf:
    """Activations by name and batch, float32, put from `device`.

    `directory` is for this shelf alone. `expected` is how many bytes will be put at most.
    """

    def __init__(self, directory: Path, expected: int, device: torch.device) -> None:
        self.place = place_for(expected, device)
        self.directory = None if self.place is not None else directory
        if self.directory is not None:
            self.directory.mkdir(exist_ok=True)
        self.kept: dict[tuple[str, int], torch.Tensor] = {}
        self.shapes: dict[tuple[str, int], torch.Size] = {}

    def put(self, name: str, start: int, value: torch.Tensor) -> None:
        """Keep what `name` has read in the batch that starts with sample `start`."""
        key = name, start
        self.shapes[key] = value.shape
        if self.directory is None:
            self.kept[key] = value.to(self.place, copy=False)
        else:
            value.float().contiguous().cpu().numpy().tofile(self._file(*key))

    def take(self, name: str, start: int) -> torch.Tensor | None:
        """Return it, and forget it; None if there is none."""
        key = name, start
        shape = self.shapes.pop(key, None)
        if shape is None:
            return None
        if self.directory is None:
            return self.kept.pop(key)
        file = self._file(*key)
        value = torch.from_file(str(file), size=shape.numel(), dtype=torch.float32).view(shape)
        file.unlink()
        return value

    def _file(self, name: str, start: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}-{start}"
