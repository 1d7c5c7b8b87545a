"""What each quality has given where it was measured."""

from __future__ import annotations

from qinit.recipe import Recipe

# KL in nats on WikiText-2's test text by quality, bits and rank, group 64: docs/results/quality.md has the commands.
FOUND = {
    ("fast", 2, 16): 1.328,
    ("fast", 3, 16): 0.285,
    ("fast", 4, 16): 0.065,
    ("balanced", 2, 16): 0.728,
    ("balanced", 3, 16): 0.193,
    ("balanced", 4, 16): 0.043,
    ("best", 2, 16): 0.534,
    ("best", 3, 16): 0.167,
}


def found_words(recipe: Recipe) -> str:
    """Return what the nearest measured run of this quality gave; an empty string where none was like it."""
    kl = FOUND.get((recipe.quality, recipe.bits, recipe.rank))
    return "" if kl is None or recipe.mixed else f"KL {kl:.2f}"
