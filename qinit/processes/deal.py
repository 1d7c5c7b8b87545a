"""Who does what: work dealt out so that all processes end at about the same time."""

from __future__ import annotations

from collections.abc import Sequence


def deal(sizes: Sequence[float], count: int) -> list[int]:
    """Return which of `count` processes takes each piece of work: the largest first, each to the one that has the
    least."""
    loads = [0.0] * count
    owners = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        owners[piece] = min(range(count), key=loads.__getitem__)
        loads[owners[piece]] += sizes[piece]
    return owners


def rounds(sizes: Sequence[int], owners: Sequence[int], count: int, most: int) -> list[list[int]]:
    """Cut work that is dealt out into rounds, after each of which the processes meet: in one of them, each takes pieces
    in their order until it has `most` or more. Every piece is in one round."""
    found: list[list[int]] = []
    at, loads = [0] * count, [0] * count
    for piece, owner in enumerate(owners):
        if loads[owner] >= most:
            at[owner], loads[owner] = at[owner] + 1, 0
        loads[owner] += sizes[piece]
        found += [[] for _ in range(at[owner] + 1 - len(found))]
        found[at[owner]].append(piece)
    return found
