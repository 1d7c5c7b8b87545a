"""What torchrun, or whatever else starts several processes of one run, says of them in the environment."""

from __future__ import annotations

import os


def count() -> int:
    """Return how many processes were started for this run."""
    return max(1, number("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process among them."""
    return number("RANK") if count() > 1 else 0


def speaks() -> bool:
    """Whether this is the process that says what there is to say."""
    return rank() == 0


def number(name: str, otherwise: int = 0) -> int:
    """Return the number that a variable of the environment holds, `otherwise` where it holds none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else otherwise
