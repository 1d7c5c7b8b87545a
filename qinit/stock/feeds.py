"""Which linear modules read what a norm gives, and whether anything else does: a probe pass of the skeleton says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qinit.stock.read_directly import TAKE_NO_VALUES, Inputs, answered, runs_through, tensors_in

# What gives the same numbers on, in another shape or type.
ALIKE = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "to", "type_as", "float"}


@dataclass
class Feed:
    """A module whose own parameters are vectors, as a norm's are; the linear modules that read what it gives, in the
    order in which they run; those that run `then`, and read something else, up to the next norm's; and the first
    function beside the readers that reads what it gives, "" where there is none."""

    norm: str
    readers: list[str] = field(default_factory=list)
    then: list[str] = field(default_factory=list)
    other: str = ""


def feeds(model: Any, linear: Mapping[str, nn.Module], trials: Sequence[Inputs]) -> list[Feed]:
    """Return what the norms of a model on the meta device give to its `linear` modules, in the order in which it runs;
    nothing where none of the `trials`, which are what it may take, gets to its end."""
    for inputs in trials:
        watch = _Watch(model, linear)
        try:
            if runs_through(model, {name: value.to("meta") for name, value in inputs.items()}, watch):
                return [feed for feed in watch.feeds.values() if feed.readers]
        finally:
            watch.leave()
    return []


class _Watch(TorchFunctionMode):
    """Follows what norms give, through other shapes and types, to the functions that read it."""

    def __init__(self, model: Any, linear: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.feeds: dict[str, Feed] = {}
        self.names = {id(module.weight): name for name, module in linear.items()}
        self.given: dict[int, tuple[torch.Tensor, Feed]] = {}  # the tensor too, or its id may become another's
        self.last: Feed | None = None
        norms = ((name, module) for name, module in model.named_modules() if _is_norm(module))
        self.handles = [module.register_forward_hook(self._noting(name)) for name, module in norms]

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _noting(self, name: str) -> Any:
        def note(_module: nn.Module, _arguments: Any, result: Any) -> None:
            if isinstance(result, torch.Tensor):
                self.given[id(result)] = result, self.feeds.setdefault(name, Feed(name))

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = answered(func, args, kwargs)
        outcome = list(tensors_in(result))
        if not outcome:  # a shape, a type or a device was asked for
            return result
        name = getattr(func, "__name__", "")
        arguments = list(tensors_in(args[:1] if name in TAKE_NO_VALUES else (args, kwargs)))
        feed = next((self.given[id(each)][1] for each in arguments if id(each) in self.given), None)
        linear = next((self.names[id(each)] for each in arguments if id(each) in self.names), None)
        if linear is not None and name not in ALIKE:  # else its weight is only turned
            if feed is not None:
                feed.readers.append(linear)
                self.last = feed
            elif self.last is not None:
                self.last.then.append(linear)
        elif feed is not None and name in ALIKE:
            self.given |= {id(each): (each, feed) for each in outcome}
        elif feed is not None:
            feed.other = feed.other or name
        return result


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and all(parameter.dim() == 1 for parameter in own) and not list(module.children())
