"""Plans whose layers take several widths, and runs of them."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from qinit.formats import FORMATS
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.runner.run import run
from tests.helpers import plan_of

WIDTHS = (2, 3, 4, 8, 2, 2, 3)  # one of each kind in every block, and another one in the next


def mixed_plan(source: Path, form: str, widths=WIDTHS, **options) -> Plan:
    """A plan whose quantized layers take these widths in turn."""
    options = {"iter": 1, "group_size": 32, "device": "cpu", **options}
    plan = plan_of(source, format=form, **options)
    given = dict(zip([layer.target.name for layer in plan.quantized], itertools.cycle(widths), strict=False))

    def widen(layer: LayerPlan, bits: int) -> LayerPlan:
        return replace(layer, bits=bits, specs=tuple(FORMATS[form].specs(layer.target, bits, layer.group_size)))

    layers = (widen(each, given[each.target.name]) if each.kept is None else each for each in plan.layers)
    return replace(plan, layers=tuple(layers))


def write(plan: Plan, directory: Path) -> Path:
    list(run(plan, directory))
    return directory


def gptq_only() -> None:
    pytest.importorskip("gptqmodel", reason="pip install 'qinit[gptq]'")
    pytest.importorskip("optimum", reason="pip install 'qinit[gptq]'")
