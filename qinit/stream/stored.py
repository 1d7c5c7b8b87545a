"""Embeddings and heads of many tokens: held in 16 bits, as they are stored, they give what they would in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

LARGE = 1 << 26  # weights: a smaller matrix is held in float32
ROWS = 1 << 14  # of a head that are in float32 at once
HALVES = (torch.bfloat16, torch.float16)
ANCHOR = "_computes_in"


def can_be_held(module: nn.Module) -> bool:
    """Whether a module is one whose weight may be held as it is stored."""
    weight = getattr(module, "weight", None)
    plain = type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)
    return plain and isinstance(weight, nn.Parameter) and weight.numel() >= LARGE


@contextmanager
def computing_in_float32(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have the modules of `model` whose large weights are in 16 bits compute as in float32; a model that asks for its
    own type, or its place, learns float32 and the `device`."""
    held = [module for module in model.modules() if can_be_held(module) and _in_halves(module)]
    asked = (module for module in model.modules() if isinstance(getattr(type(module), "dtype", None), property))
    owners = list(asked) if held else []
    try:
        for module in held:
            forward: Any = _looked_up if isinstance(module, nn.Embedding) else _multiplied
            module.forward = partial(forward, module)  # type: ignore[method-assign]
        for owner in owners:
            owner.register_parameter(ANCHOR, nn.Parameter(torch.empty(0, device=device), requires_grad=False))
        yield
    finally:
        for module in held:
            del module.forward
        for owner in owners:
            owner._parameters.pop(ANCHOR, None)


def _in_halves(module: Any) -> bool:
    return module.weight.dtype in HALVES and not module.weight.is_meta


def _looked_up(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return functional.embedding(ids, module.weight).float()


def _multiplied(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _Product.apply(x, module.weight)
    return product if module.bias is None else product + module.bias


class _Product(torch.autograd.Function):
    """x W' of x [..., in] and W [out, in], which gets no gradient, some rows of W at a time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        result = x.new_empty((*x.shape[:-1], len(weight)))
        for start in range(0, len(weight), ROWS):
            part = weight[start : start + ROWS].to(x.dtype)
            result[..., start : start + ROWS] = x @ part.T
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        result = gradient.new_zeros((*gradient.shape[:-1], weight.shape[1]))
        for start in range(0, len(weight), ROWS):
            result += gradient[..., start : start + ROWS] @ weight[start : start + ROWS].to(gradient.dtype)
        return result, None
