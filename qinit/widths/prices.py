"""What a little more room would buy, by what it is spent on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qinit.plan.allocation import Option
from qinit.widths.knapsack import Choice, Item

SHARE = 0.01  # of the size: so much is spent


def prices(items: Sequence[Item], picks: Sequence[int]) -> dict[str, float]:
    """Return by field of Option the nats per token that a megabyte (10^6 bytes) is predicted to win back, beside an
    allocation under one budget for base and adapter, where the next SHARE of its size is spent on that alone: on more
    bits, smaller groups or larger ranks, each in the layers where it wins most."""
    chosen = [item.totals[pick] for item, pick in zip(items, picks, strict=True)]
    room = SHARE * sum(choice.stored_bits for choice in chosen)
    return {field: _price(list(_steps(items, chosen, field)), room) for field in Option._fields}


def _steps(items: Sequence[Item], chosen: Sequence[Choice], field: str) -> Iterator[tuple[float, float]]:
    """Yield for each item the best step up in one field alone: the bits that it takes, and the nats that it wins."""
    for item, now in zip(items, chosen, strict=True):
        others = now.option._replace(**{field: 0})
        steps = [
            (other.stored_bits - now.stored_bits, now.nats - other.nats)
            for other in item.totals
            if other.option._replace(**{field: 0}) == others and other.stored_bits > now.stored_bits
        ]
        if steps:
            yield max(steps, key=lambda step: step[1] / step[0])


def _price(steps: list[tuple[float, float]], room: float) -> float:
    """Return nats per megabyte, of the best steps until the room is spent."""
    bits = nats = 0.0
    for size, won in sorted(steps, key=lambda step: -step[1] / step[0]):
        if bits >= room or won <= 0:
            break
        bits, nats = bits + size, nats + won
    return 8e6 * nats / bits if bits else 0.0
