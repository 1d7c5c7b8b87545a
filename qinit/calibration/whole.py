"""Statistics from the whole model in memory: for models that do not run block by block, and for gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from qinit.calibration.activations import batch_size, oriented, require_finite_input, unpadded, weight_in
from qinit.calibration.experts import PORTION_BYTES, ExpertMeters, listening, parameters_of, portions
from qinit.calibration.meter import Meter
from qinit.calibration.seen import Seen
from qinit.clock import section
from qinit.events import Measuring
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.solver.statistics import Statistics
from qinit.stream.whole import load_whole, read_tokens
from qinit.text.samples import Portion, Samples


class WholeModel:
    """The whole model as the one block of a walk."""

    def __init__(
        self,
        plan: Plan,
        samples: Samples,
        device: torch.device,
        finished: Collection[str] = (),
        portion: Portion = int,
    ) -> None:
        self.plan, self.samples, self.device, self.finished = plan, samples, device, frozenset(finished)
        self.portion = portion

    def visit(self) -> Iterator[Measuring | Seen]:
        """Yield what a Walk does in mode `parallel`, from one pass of the whole model (float32) and all H matrices at
        once.

        For a method that needs the Fisher information, a backward pass per sample gives the mean squared gradient of
        the next-token loss for every weight (LQ-LoRA, arXiv:2311.12023, section 3.3). Raises CalibrationError.
        """
        plan, samples, device = self.plan, self.samples, self.device
        model = load_whole(plan).to(device)
        yield Measuring(0, 1, tuple(layer.target.name for layer in plan.quantized))
        linear = [layer for layer in plan.quantized if layer.target.module.expert is None]
        names = [layer.target.name for layer in linear]
        meters = {layer.target.name: Meter([layer], device) for layer in linear}
        mask: torch.Tensor | None = None
        first = 0

        def measure(name: str) -> Any:
            def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
                x = args[0].detach()
                require_finite_input(x, name, first, samples)
                meters[name].add(unpadded(x, mask))

            return hook

        hooks = [model.get_submodule(name).register_forward_pre_hook(measure(name)) for name in names]
        size = self.portion(batch_size(plan, samples, device))

        def run() -> None:
            nonlocal first, mask
            for first in range(0, len(samples.tokens), size):
                part = slice(first, first + size)
                mask = None if samples.mask is None else samples.mask[part].to(device)
                read_tokens(model, samples.tokens[part].to(device), mask, plan)

        with section("forward"), torch.no_grad():
            run()
        for hook in hooks:
            hook.remove()
        fisher = _fisher(model, plan, samples, device) if "fisher" in plan.recipe.row.needs else {}
        for layer in linear:
            weight = model.get_submodule(layer.target.name).weight.data
            statistics = meters.pop(layer.target.name).statistics(layer)
            if statistics is not None and layer.target.name in fisher:
                statistics = replace(statistics, fisher=fisher.pop(layer.target.name))
            if layer.target.name not in self.finished:
                yield Seen(layer, oriented(weight, layer), partial(_as_is, statistics))
        pools: dict[str, Meter] = {}
        for pack in _packs(plan, self.finished):
            stacked = {stack: ExpertMeters(some, device, pools.get(stack)) for stack, some in pack}

            def read(name: str, x: torch.Tensor, stacked: dict[str, ExpertMeters] = stacked) -> None:
                require_finite_input(x, name, first, samples)
                stacked[name.rpartition("[")[0]].add(name, x)

            with section("forward"), torch.no_grad(), listening(model, list(stacked), read):
                run()
            pools |= {stack: meters.pool for stack, meters in stacked.items()}
            for stack, some in pack:
                for layer in some:
                    found = stacked[stack].statistics(layer)
                    if found is not None and layer.target.name in fisher:
                        found = replace(found, fisher=fisher.pop(layer.target.name))
                    if layer.target.name not in self.finished:
                        yield Seen(layer, weight_in(model, layer.target.name, layer), partial(_as_is, found))


def _as_is(statistics: Statistics | None) -> Statistics | None:
    return statistics


def _packs(plan: Plan, finished: frozenset[str]) -> Iterator[list[tuple[str, list[LayerPlan]]]]:
    """Yield the experts that are not finished, by the names of their parameters, as many at once as have H matrices of
    PORTION_BYTES, and of each parameter a portion at most."""
    pack: dict[str, list[LayerPlan]] = {}
    size = 0
    for stack in parameters_of([layer.target.name for layer in plan.quantized]):
        for some in portions([layer for layer in plan.quantized if layer.target.module.parameter == stack]):
            if finished >= {layer.target.name for layer in some}:
                continue
            needed = 4 * len(some) * some[0].target.module.in_features ** 2
            if pack and (stack in pack or size + needed > PORTION_BYTES):
                yield list(pack.items())
                pack, size = {}, 0
            pack[stack], size = some, size + needed
    if pack:
        yield list(pack.items())


def _fisher(model: Any, plan: Plan, samples: Samples, device: torch.device) -> dict[str, torch.Tensor]:
    names = dict.fromkeys(layer.target.module.parameter for layer in plan.quantized)
    parameters = {name: model.get_parameter(name) for name in names}
    model.requires_grad_(False)
    squares = {}
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        squares[name] = torch.zeros_like(parameter)
    for index, row in enumerate(samples.tokens):
        tokens = row if samples.mask is None else row[samples.mask[index]]
        if len(tokens) < 2:
            continue
        tokens = tokens[None].to(device)
        with torch.enable_grad():
            model(input_ids=tokens, labels=tokens).loss.backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares[name].add_(parameter.grad.square(), alpha=1 / len(samples.tokens))
                parameter.grad = None
    found = {}
    for layer in plan.quantized:
        square, expert = squares[layer.target.module.parameter], layer.target.module.expert
        found[layer.target.name] = oriented(square if expert is None else square[expert.index], layer)
    return found
