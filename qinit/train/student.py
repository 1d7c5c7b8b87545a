"""A quantized model as a trainer would have it: Q as codes, B A beside it, everything else as in the source."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qinit.calibration.activations import put_weight
from qinit.grids import Quantized
from qinit.linalg.low_rank import LowRank
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.stream.blocks import Blocks
from qinit.stream.calls import NotStreamable
from qinit.stream.whole import load_whole
from qinit.train.bases import CodedBase, DenseBase
from qinit.train.repaired import Repaired


@dataclass(frozen=True)
class Start:
    """Where a layer starts from: Q as codes on an integer grid, or as a weight [out, in], and L = B A."""

    base: Quantized | torch.Tensor
    low_rank: LowRank


@contextmanager
def student_of(
    plan: Plan,
    starts: Mapping[str, Start],
    device: torch.device,
    weight_of: Callable[[LayerPlan], torch.Tensor] | None = None,
) -> Generator[Any, None, None]:
    """Give the model of a plan with the layers of `starts`, by name, on Q and B A: a class of transformers, in eval
    mode, with no gradients but those of factors and scales. The plan's experts, and layers without an adapter, have
    what `weight_of` returns, Q + B A [out, in], which is not trained.

    It is put together block by block, so that beside it no more than one block's weights are in memory; a model that is
    no row of blocks is loaded whole first. It computes in float32 on a CPU, else in bfloat16.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with ExitStack() as stack:
        try:
            model = stack.enter_context(_put_together(plan, starts, device, dtype, weight_of))
        except NotStreamable:
            model = load_whole(plan).to(device, dtype).requires_grad_(False)
            _put_fixed(model, plan, "", weight_of)
        left = {name: start for name, start in starts.items() if not isinstance(model.get_submodule(name), Repaired)}
        stack.enter_context(_repaired(model, left, device))
        for module in model.modules():  # some look at their own numbers, and not whether they are trained
            vars(module).update((key, 0.0) for key, value in vars(module).items() if "drop" in key and _is_rate(value))
        yield model


@contextmanager
def _put_together(
    plan: Plan,
    starts: Mapping[str, Start],
    device: torch.device,
    dtype: torch.dtype,
    weight_of: Callable[[LayerPlan], torch.Tensor] | None,
) -> Generator[Any, None, None]:
    """Give the model with all layers in its blocks repaired. Raises NotStreamable."""
    blocks = Blocks.of(plan, device)
    blocks.require_whole()
    for row in blocks.rows:
        for index in range(len(row)):
            row.load(index).to(dtype)
            _put_fixed(blocks.model, plan, row.prefix(index), weight_of)
            _repair(blocks.model, {name: starts[name] for name in starts if name.startswith(row.prefix(index))}, device)
    with blocks.surroundings(head=True, trained=True):
        for name in blocks.outside:
            parameter = blocks.model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
        yield blocks.model


def _put_fixed(model: Any, plan: Plan, prefix: str, weight_of: Callable[[LayerPlan], torch.Tensor] | None) -> None:
    """Give what is not trained, experts and layers without an adapter, its weights, where its name begins with
    `prefix`."""
    for layer in plan.quantized:
        fixed = layer.target.module.expert is not None or not layer.rank
        if weight_of is not None and fixed and layer.target.name.startswith(prefix):
            put_weight(model, layer.target.name, layer, weight_of(layer))


@contextmanager
def _repaired(model: Any, starts: Mapping[str, Start], device: torch.device) -> Generator[None, None, None]:
    """Repair layers that lie outside of the blocks, and put their own back at the end."""
    own = {name: model.get_submodule(name) for name in starts}
    _repair(model, starts, device)
    try:
        yield
    finally:
        for name, linear in own.items():
            model.set_submodule(name, linear)


def _repair(model: Any, starts: Mapping[str, Start], device: torch.device) -> None:
    for name, start in starts.items():
        base = CodedBase(start.base) if isinstance(start.base, Quantized) else DenseBase(start.base)
        model.set_submodule(name, Repaired(base.to(device), model.get_submodule(name).bias, start.low_rank))


def _is_rate(value: Any) -> bool:
    return isinstance(value, float) and value > 0
