"""A pass forward and back through a model with an adapter: what it predicts, and whether every factor learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qinit.stock.inputs import possible_inputs
from qinit.stock.read_directly import tensors_in
from qinit.trial.names import reason, shown

PARTS = ("lora_A", "lora_B")


def outputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors of floating point that a model gives for these inputs, in order."""
    options = {"use_cache": False} if "input_ids" in inputs else {}
    try:
        found = model(**inputs, **options)
    except TypeError:  # some models have no cache to leave out
        found = model(**inputs)
    return list(_floating(found))


def first_run(model: Any, directory: Path) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]] | str:
    """Run a model on the first inputs that it takes; returns them and its outputs, or why it takes none."""
    refused = "no inputs are known for it"
    for inputs in possible_inputs(model, directory):
        try:
            outputs = outputs_of(model, inputs)
        except Exception as error:  # a model can ask for anything
            refused = f"{' and '.join(inputs)}: {reason(error)}"
            continue
        if outputs:
            return inputs, outputs
    return refused


def _floating(value: Any) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.numel())


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference between two models' outputs, each relative to the expected one's norm."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    norms = (
        (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        for a, b in zip(found, expected, strict=True)
    )
    return max((float(each) for each in norms), default=0.0)


class Reached:
    """Notes which adapted modules a pass goes through."""

    def __init__(self, model: Any) -> None:
        self.modules = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        self.names: set[str] = set()
        self.handles = [
            module.register_forward_hook(lambda *_, name=name: self.names.add(name))
            for name, module in self.modules.items()
        ]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def learn(outputs: list[torch.Tensor], model: Any, reached: Reached) -> Iterator[tuple[bool, str]]:
    """Go back from random weights on all outputs; yields what is wrong (True), or only to be known (False), with the
    gradients of the adapter's factors. A factor B of zeros gives its A none, and rightly so."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(each.shape, generator=generator) for each in outputs]
    parts = [(each * weights).sum() for each, weights in zip(outputs, drawn, strict=True) if each.requires_grad]
    if not parts:
        yield True, "no output depends on the adapter, so that nothing is trained"
        return
    torch.stack(parts).sum().backward()
    yield from judged(model, reached)


def judged(model: Any, reached: Reached) -> Iterator[tuple[bool, str]]:
    """Look at the gradients that every factor has; as `learn`."""
    kinds: dict[str, set[str]] = {"none": set(), "not finite": set(), "zero": set()}
    for name in sorted(reached.names):
        factors = {part: dict(getattr(reached.modules[name], part).named_parameters()) for part in PARTS}
        neutral = not any(bool(factor.any()) for factor in factors["lora_B"].values())
        for part, found in factors.items():
            for factor in found.values():
                if factor.grad is None:
                    kinds["none"].add(name)
                elif not bool(torch.isfinite(factor.grad).all()):
                    kinds["not finite"].add(name)
                elif not bool(factor.grad.any()) and not (part == "lora_A" and neutral):
                    kinds["zero"].add(name)
    if kinds["none"]:
        yield True, f"no gradient reaches the factors of {shown(kinds['none'])}, though its inputs do"
    if kinds["not finite"]:
        yield True, f"the gradients of {shown(kinds['not finite'])} are not finite"
    if kinds["zero"]:
        yield False, f"the gradients of {shown(kinds['zero'])} are zero on these inputs"
    if unreached := reached.modules.keys() - reached.names:
        yield False, f"not tried, as these inputs do not reach it: {shown(unreached)}"
