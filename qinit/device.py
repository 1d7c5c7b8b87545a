"""Which device the arithmetic runs on."""

from __future__ import annotations

import torch

from qinit.errors import RecipeError


def pick_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`; raises RecipeError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or 0)  # torch.device wraps large ones around
        if index >= count:
            raise RecipeError(f"device: no '{name}' here, torch sees {count} CUDA devices; use --device cpu or auto")
        return torch.device("cuda", index)
    return torch.device(name)
