"""The rows of a plan's table: a layer each, but experts that are treated alike together."""

from __future__ import annotations

from collections.abc import Sequence

from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan


def rows_of(plan: Plan) -> list[tuple[str, list[LayerPlan]]]:
    """Return the layers, each with its name; experts of one parameter that are treated alike together, `NAME[0-7]`."""
    found: dict[tuple[str, int, int], list[LayerPlan]] = {}
    for layer in plan.layers:
        alone = layer.target.module.expert is None
        found.setdefault(
            (layer.target.name if alone else layer.target.module.parameter, layer.bits, layer.rank), []
        ).append(layer)
    rows = []
    for (name, _, _), layers in found.items():
        numbers = [layer.target.module.expert.index for layer in layers if layer.target.module.expert is not None]
        rows.append((f"{name}[{_spans(numbers)}]" if numbers else name, layers))
    return rows


def _spans(numbers: Sequence[int]) -> str:
    """Write rising numbers as spans: 0-3, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
