"""Statistics from the whole model in memory: for models that do not run block by block, and for gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from qinit.calibration.activations import batch_size, oriented, require_finite_input, unpadded
from qinit.calibration.meter import Meter
from qinit.calibration.walk import Seen
from qinit.clock import section
from qinit.events import Measuring
from qinit.plan.plan import Plan
from qinit.solver.statistics import Statistics
from qinit.stream.whole import load_whole, read_tokens
from qinit.text.samples import Samples


class WholeModel:
    """The whole model as the one block of a walk."""

    def __init__(self, plan: Plan, samples: Samples, device: torch.device, finished: Collection[str] = ()) -> None:
        self.plan, self.samples, self.device, self.finished = plan, samples, device, finished

    def visit(self) -> Iterator[Measuring | Seen]:
        """Yield what a Walk does in mode `parallel`, from one pass of the whole model (float32) and all H matrices at
        once.

        For a method that needs the Fisher information, a backward pass per sample gives the mean squared gradient of
        the next-token loss for every weight (LQ-LoRA, arXiv:2311.12023, section 3.3). Raises CalibrationError.
        """
        plan, samples, device = self.plan, self.samples, self.device
        model = load_whole(plan).to(device)
        names = tuple(layer.target.name for layer in plan.quantized)
        yield Measuring(0, 1, names)
        meters = {layer.target.name: Meter([layer], device) for layer in plan.quantized}
        mask: torch.Tensor | None = None
        first = 0

        def measure(name: str) -> Any:
            def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
                x = args[0].detach()
                require_finite_input(x, name, first, samples)
                meters[name].add(unpadded(x, mask))

            return hook

        hooks = [model.get_submodule(name).register_forward_pre_hook(measure(name)) for name in names]
        size = batch_size(plan, samples, device)
        with section("forward"), torch.no_grad():
            for first in range(0, len(samples.tokens), size):
                part = slice(first, first + size)
                mask = None if samples.mask is None else samples.mask[part].to(device)
                read_tokens(model, samples.tokens[part].to(device), mask, plan)
        for hook in hooks:
            hook.remove()
        fisher = _fisher(model, plan, samples, device) if "fisher" in plan.recipe.row.needs else {}
        for layer in plan.quantized:
            weight = model.get_submodule(layer.target.name).weight.data
            statistics = meters.pop(layer.target.name).statistics(layer)
            if statistics is not None and layer.target.name in fisher:
                statistics = Statistics(
                    statistics.hessian, statistics.magnitude, statistics.tokens, fisher=fisher.pop(layer.target.name)
                )
            if layer.target.name not in self.finished:
                yield Seen(layer, oriented(weight, layer), statistics)


def _fisher(model: Any, plan: Plan, samples: Samples, device: torch.device) -> dict[str, torch.Tensor]:
    modules = {layer.target.name: model.get_submodule(layer.target.name) for layer in plan.quantized}
    model.requires_grad_(False)
    squares = {}
    for name, module in modules.items():
        module.weight.requires_grad_(True)
        squares[name] = torch.zeros_like(module.weight)
    for index, row in enumerate(samples.tokens):
        tokens = row if samples.mask is None else row[samples.mask[index]]
        if len(tokens) < 2:
            continue
        tokens = tokens[None].to(device)
        with torch.enable_grad():
            model(input_ids=tokens, labels=tokens).loss.backward()
        for name, module in modules.items():
            if module.weight.grad is not None:
                squares[name].add_(module.weight.grad.square(), alpha=1 / len(samples.tokens))
                module.weight.grad = None
    by_name = {layer.target.name: layer for layer in plan.quantized}
    return {name: oriented(square, by_name[name]) for name, square in squares.items()}
