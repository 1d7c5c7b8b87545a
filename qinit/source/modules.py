"""What can be told of a model's linear modules from the skeleton without weights: whether they are no more than
W x + b, and which of them an enclosing module initializes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def is_plain(module: Any) -> bool:
    """Whether a linear module computes W x + b and nothing else. A subclass with a forward of its own is tried: on its
    own weights no more, as they are on the meta device, but on 3 x 2 random ones in their place."""
    if type(module).forward is nn.Linear.forward or not isinstance(module, nn.Linear):
        return True
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((3, 2), (3,), (1, 4, 2)))
    small = copy.copy(module)
    small._parameters = dict(module._parameters)
    small._parameters["weight"] = nn.Parameter(weight)
    if module.bias is not None:
        small._parameters["bias"] = nn.Parameter(bias)
    small.out_features, small.in_features = weight.shape
    try:
        with torch.no_grad():
            found = small(x)
            expected = functional.linear(x, weight, bias if module.bias is not None else None)
    except Exception:  # it can do anything; then it is not what a repair is made for
        return False
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def set_by_parents(model: Any, linear: dict[str, Any]) -> set[str]:
    """Return the names of those `linear` modules whose weight an enclosing module's initialization writes to.

    transformers initializes all modules at load, and spares weights that are there by a flag on them. A packed layer
    has no weight, so that it fails: here each is hidden once while its parents are initialized, on meta for free.
    """
    parents = {path: (module, initialize) for path, module, initialize in _initialized(model, "", None)}
    found, known = set(), dict[tuple[type, str], bool]()
    for name, part in linear.items():
        steps = name.split(".")
        for depth in range(len(steps)):
            if ".".join(steps[:depth]) not in parents:
                continue
            module, initialize = parents[".".join(steps[:depth])]
            kind = type(module), re.sub(r"\d+", "0", ".".join(steps[depth:]))
            if kind not in known:
                known[kind] = _needs(initialize, module, part)
            if known[kind]:
                found.add(name)
    return found


def _initialized(module: Any, path: str, initialize: Any) -> Iterator[tuple[str, Any, Callable[[Any], Any]]]:
    """Yield every module with its path and what initializes it: the method of the model that it is in, as in
    transformers."""
    own = getattr(module, "_init_weights", None)
    initialize = own if callable(own) else initialize
    if initialize is not None:
        yield path, module, initialize
    for name, child in module.named_children():
        yield from _initialized(child, f"{path}.{name}".lstrip("."), initialize)


def _needs(initialize: Callable[[Any], Any], module: Any, part: Any) -> bool:
    """Whether the initialization of a module runs, and does so no longer once a part of it has no weight."""
    versions = part.weight._version
    if not _runs(initialize, module):
        return False  # code written for real tensors: it says nothing about this module then
    if part.weight._version != versions:
        return True
    weight = part._parameters.pop("weight")
    try:
        return not _runs(initialize, module)
    finally:
        part._parameters["weight"] = weight


def _runs(initialize: Callable[[Any], Any], module: Any) -> bool:
    try:
        with torch.no_grad():
            initialize(module)
    except Exception:
        return False
    return True
