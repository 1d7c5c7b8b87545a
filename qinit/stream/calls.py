"""How a model calls one of its blocks: all arguments but the hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qinit.machine import fast_products

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class NotStreamable(Exception):  # noqa: N818
    """The model is no rows of blocks, or its checkpoint does not hold them one by one."""


class Stop(Exception):  # noqa: N818
    """Ends a forward pass once it has delivered what it was started for."""


@dataclass(frozen=True)
class Slot:
    """Stands for an argument that the rows of blocks before have made, such as the encoder's output in a decoder: the
    `number`-th of these."""

    number: int


class Call:
    """How a model calls one of its blocks: all arguments but the hidden states."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.by_name = not args
        self.args = args[1:]
        self.kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run the block on `hidden` [batch, length, width] and return its output, of the same shape."""
        with fast_products(hidden.device):
            output = (
                block(hidden_states=hidden, **self.kwargs) if self.by_name else block(hidden, *self.args, **self.kwargs)
            )
        return output[0] if isinstance(output, tuple | list) else output

    def parted(self, made: list[torch.Tensor]) -> Call:
        """Return the call with a Slot for each tensor that carries a gradient: what came out of the rows of blocks
        before. They are added to `made`, each once.

        Raises NotStreamable for such a tensor inside another argument.
        """

        def part(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                if carries_gradient(value):
                    raise NotStreamable("a block gets what other blocks have made inside another argument")
                return value
            if not value.requires_grad:
                return value
            number = next((i for i, known in enumerate(made) if known is value), len(made))
            if number == len(made):
                made.append(value)
            return Slot(number)

        return self._with(part)

    def filled(self, values: Sequence[torch.Tensor]) -> Call:
        """Return the call with these values in the places of the Slots."""
        return self._with(lambda value: values[value.number] if isinstance(value, Slot) else value)

    def _with(self, change: Callable[[Any], Any]) -> Call:
        other = copy.copy(self)
        other.args = tuple(map(change, self.args))
        other.kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return other


def carries_gradient(value: Any) -> bool:
    """Whether a tensor, or one in a list, tuple or dictionary, carries a gradient."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(carries_gradient, value.values()))
    return isinstance(value, list | tuple) and any(map(carries_gradient, value))


def alike(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are the same as far as can be seen: tensors, and what holds them."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    return type(one) is type(other)
