"""A model's layers: which adapters each block has, and which of the blocks train."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

PART = re.compile(r"^(?P<module>.+)\.(?P<part>lora_[ABE])\.(?P<adapter>[^.]+)$")
BLOCK = re.compile(r"^.*?(?:^|\.)\d+(?=\.|$)")


@dataclass
class Layer:
    """A block of the model, or a module outside of all blocks: its adapters' parameters by module and part
    (lora_A [r, in] is Q, lora_E [r, 1] Lambda, lora_B [out, r] P)."""

    name: str
    modules: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parts in self.modules.values() for parameter in parts.values()]

    @property
    def ranks(self) -> int:
        """How many triplets are in use: those whose Lambda is not zero."""
        return sum(int((parts["lora_E"] != 0).sum()) for parts in self.modules.values())

    @property
    def size(self) -> int:
        """How many values train when the layer does."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def size_in_use(self) -> int:
        """How many of them are of triplets in use."""
        return sum(int((parts["lora_E"] != 0).sum()) * triplet(parts) for parts in self.modules.values())

    def size_at(self, rank: int) -> int:
        """How many values so many triplets in each module have."""
        return sum(rank * triplet(parts) for parts in self.modules.values())


def triplet(parts: dict[str, nn.Parameter]) -> int:
    """Return how many values a triplet of a module has: a row of Q, one of Lambda, a column of P."""
    return parts["lora_A"].shape[1] + 1 + parts["lora_B"].shape[0]


def layers_of(model: nn.Module, adapter: str) -> list[Layer]:
    """Return the layers that have adapters of this name, in the model's order. A layer is all of a block, up to the
    first number in a module's name; what lies outside of the blocks is a layer each."""
    found: dict[str, Layer] = {}
    for name, parameter in model.named_parameters():
        part = PART.match(name)
        if part is not None and part["adapter"] == adapter:
            block = BLOCK.match(part["module"])
            layer_name = block[0] if block else part["module"]
            layer = found.setdefault(layer_name, Layer(layer_name))
            layer.modules.setdefault(part["module"], {})[part["part"]] = parameter
    return list(found.values())


def train_only(layers: Collection[Layer], chosen: Collection[str], optimizer: Any) -> None:
    """Let these layers train, and the others wait: without a gradient, and without a state in the optimizer, which
    makes it anew when a layer goes on."""
    for layer in layers:
        trains = layer.name in chosen
        for parameter in layer.parameters:
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
                optimizer.state.pop(parameter, None)


def state_bytes(optimizer: Any) -> int:
    """Return how much an optimizer keeps about its parameters."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
