"""Experts: the matrices of a mixture that a model has as slices of 3-D parameters, and the tensors that hold them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qinit.files.tensors import StoredTensor, slice_name
from qinit.source.names import Names
from qinit.source.products import Product, Products, one_by_one, stacked_parameters

TINY = (4, 6)  # the shape of a matrix that stands for an expert's where only the order of things is asked


@dataclass(frozen=True)
class Stack:
    """The matrices of a layer's experts, one slice of a 3-D parameter each: `count` slices [out_features, in_features],
    or [in_features, out_features] where they are `transposed`; `told`: the module says so itself (`is_transposed`).

    `sources` names for each slice the checkpoint's tensors (NAME[i] for a slice of one) whose values it has, one after
    the other along its outputs. `unknown` says why qinit does not quantize them; there are no sources then. `place`
    counts the linear modules that come before it in the model.
    """

    name: str
    count: int
    out_features: int
    in_features: int
    transposed: bool
    place: int
    told: bool = False
    sources: tuple[tuple[str, ...], ...] = ()
    unknown: str | None = None

    @property
    def module(self) -> str:
        """The name of the module whose parameter it is."""
        return self.name.rpartition(".")[0]

    def slice_names(self) -> list[str]:
        return [slice_name(self.name, index) for index in range(self.count)]


def read_stacks(model: Any, names: Names, is_linear: Any) -> tuple[Stack, ...]:
    """Find the stacked experts of a model on the meta device, and where the checkpoint, whose `names` these are, has
    them.

    A module's 3-D parameters are experts where its forward multiplies with their slices (see `Products`): it is tried
    on one token, without computing anything. `is_linear` says which modules are linear layers of their own.
    """
    found: list[Stack] = []
    tried: dict[Any, dict[str, bool | str]] = {}
    place = 0
    for path, module in model.named_modules():
        place += is_linear(module)
        parameters = stacked_parameters(module)
        if not parameters:
            continue
        kind = type(module), tuple((name, tuple(p.shape)) for name, p in parameters.items())
        if kind not in tried:
            tried[kind] = _turned(module, parameters)
        for name, parameter in parameters.items():
            count, rows, columns = parameter.shape
            turned = tried[kind][name]
            told = bool(getattr(module, "is_transposed", False))
            stack = Stack(f"{path}.{name}", count, rows, columns, False, place, told)
            if isinstance(turned, str):
                stack = replace(stack, unknown=turned)
            elif turned:
                stack = replace(stack, out_features=columns, in_features=rows, transposed=True)
            found.append(stack if stack.unknown else _sourced(stack, names))
    return tuple(found)


def _turned(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, bool | str]:
    """Say of each parameter whether its slices are [in, out], or why that is not known."""
    found: dict[str, bool | str] = {}
    weights = {name: torch.zeros(()).expand(p.shape) for name, p in parameters.items()}  # of no size in memory
    others = {
        name: torch.zeros(tensor.shape)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if name not in weights
    }

    def seen(product: Product) -> torch.Tensor:
        _, rows, columns = weights[product.parameter].shape
        inputs, outputs = (rows, columns) if product.turned else (columns, rows)
        if product.x.shape[-1] != inputs:
            raise ValueError(f"an input of width {product.x.shape[-1]}")
        found[product.parameter] = product.turned
        return product.x.new_zeros((*product.x.shape[:-1], outputs))

    reason = "its experts are not called with hidden states and a choice of experts"
    widths = dict.fromkeys(size for p in parameters.values() for size in p.shape[:0:-1])
    for arguments in _arguments(module, len(next(iter(parameters.values()))), list(widths)):
        found.clear()
        mode = Products(weights, seen)
        try:
            with one_by_one(module), torch.no_grad(), mode:
                torch.func.functional_call(module, {**weights, **others}, arguments)
        except Exception as error:  # a module can ask for anything
            reason = f"its experts cannot be tried ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
            continue
        strange = next(iter(mode.unknown.items()), None)
        reason = f"its experts are computed in another way ({strange[1]} of {strange[0]})" if strange else reason
        if found and not strange:
            break
        found.clear()
    return {name: found.get(name, reason) for name in parameters}


def _arguments(module: nn.Module, experts: int, widths: Sequence[int]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield what a module of experts may be called with: one token, its experts and their weights; or a token for each
    expert."""
    asked = len(inspect.signature(module.forward).parameters)
    for width in widths:
        if asked >= 3:
            yield torch.zeros(1, width), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
        elif asked == 1:
            yield (torch.zeros(experts, width),)


def _sourced(stack: Stack, names: Names) -> Stack:
    """Give a stack its sources, found by making the parameter of small tensors in the place of the checkpoint's."""
    tensors = names.parts_of(stack.name)
    if not tensors:
        return replace(stack, unknown="the checkpoint does not hold them in a way that transformers converts")
    stored: dict[str, StoredTensor] = {}  # what a slice may consist of
    parts: list[torch.Tensor] = []  # and what stands for it
    stand_ins: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        stacked = len(tensor.shape) == 3
        pieces = tensor.slices() if stacked else [tensor]
        first = len(parts) * TINY[0] * TINY[1]
        stand_in = torch.arange(first, first + len(pieces) * TINY[0] * TINY[1]).reshape(-1, *TINY)
        stored |= {piece.name: piece for piece in pieces}
        parts += stand_in
        stand_ins[tensor.name] = stand_in if stacked else stand_in[0]
    try:
        whole = names.make(stack.name, lambda tensor: stand_ins[tensor.name])
    except Exception as error:  # an operation can ask for anything of its tensors
        return replace(stack, unknown=f"transformers converts them in another way ({type(error).__name__})")
    whole = stand_ins[tensors[0].name] if whole is None else whole
    named = list(zip(stored, parts, strict=True))
    sources = [_sources(piece, named, stack.transposed) for piece in whole]
    if len(sources) != stack.count or not all(
        found and _fits(stack, [stored[name] for name in found]) for found in sources
    ):
        return replace(stack, unknown="the checkpoint stores them in another layout than the model has")
    return replace(stack, sources=tuple(tuple(found) for found in sources))


def _sources(piece: torch.Tensor, parts: list[tuple[str, torch.Tensor]], transposed: bool) -> list[str]:
    """Return the names of the parts that a slice consists of, one after the other; none where it is more than that."""
    size = TINY[0] * TINY[1]
    found = [parts[value // size] for value in piece.flatten().tolist() if value % size == 0]
    same = bool(found) and torch.equal(torch.cat([part for _, part in found], dim=1 if transposed else 0), piece)
    return [name for name, _ in found] if same else []


def _fits(stack: Stack, tensors: list[StoredTensor]) -> bool:
    """Whether the tensors have the shapes, and one type that is read, of the slice that they make up."""
    outputs, inputs = (1, 0) if stack.transposed else (0, 1)
    if any(len(tensor.shape) != 2 or tensor.shape[inputs] != stack.in_features for tensor in tensors):
        return False
    dtypes = {tensor.dtype for tensor in tensors}
    readable = all(dtype.is_floating_point and dtype.itemsize in (2, 4) for dtype in dtypes)
    return len(dtypes) == 1 and readable and sum(t.shape[outputs] for t in tensors) == stack.out_features
