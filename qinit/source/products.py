"""Which matrix products a module makes with slices of its 3-D parameters, as the experts of a mixture are computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

INDEXING = {torch.Tensor.__getitem__, torch.Tensor.select, torch.select}
UNBINDING = {torch.Tensor.unbind, torch.unbind}
ALIKE = {torch.Tensor.to, torch.Tensor.contiguous, torch.Tensor.float, torch.Tensor.type_as, torch.Tensor.detach}
TURNING = {
    *(torch.Tensor.t, torch.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__),  # type: ignore[attr-defined]
    *(torch.Tensor.transpose, torch.transpose, torch.Tensor.permute, torch.permute),
}
# W is the second argument: x W
MULTIPLYING = {
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm),
    *(torch.bmm, torch.Tensor.bmm),
}
ADDING = {torch.addmm, torch.baddbmm}  # the same behind a sum's first part


@dataclass(frozen=True)
class Product:
    """An expert's product: `parameter` names the 3-D parameter, `index` the slice W of it; `turned` says that the
    product is x W with W [in, out], else it is x W' with W [out, in]. `x` is [tokens, in]."""

    parameter: str
    index: int
    turned: bool
    x: torch.Tensor


@dataclass(frozen=True)
class _View:
    """A tensor that is a parameter (`index` is None) or a slice of it; `turned`: its last two dimensions swapped."""

    parameter: str
    index: int | None
    turned: bool
    tensor: weakref.ref[torch.Tensor]


def _nothing(_product: Product) -> None:
    """The `seen` that leaves all as it is."""


def _itself(_products: list[Product], result: torch.Tensor) -> torch.Tensor:
    """The `given` that leaves all as it is."""
    return result


class Products(TorchFunctionMode):
    """Within this context, `seen` is called with every product of a slice of the given 3-D parameters, before it is
    computed. What it returns takes the place of the result; None lets it be computed. Then `given` is called with the
    product, or one for each slice of the whole parameter, and with the result [tokens, out], or that of all slices
    [slices, tokens, out]; what it returns takes the place of the result.

    Slices are followed through indexing by one number, transposition and changes of type; products are
    `functional.linear`, `@` and its kin, and a batched product with the whole parameter. What else reads a parameter is
    kept in `unknown`, by the parameter's name: not all of its products have been seen then.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        seen: Callable[[Product], torch.Tensor | None] = _nothing,
        given: Callable[[list[Product], torch.Tensor], torch.Tensor] = _itself,
    ) -> None:
        super().__init__()
        self.seen, self.given, self.unknown = seen, given, dict[str, str]()
        self.views = {id(t): _View(name, None, False, weakref.ref(t)) for name, t in parameters.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.views.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        view = self._first(args, kwargs)
        if view is None:
            return func(*args, **kwargs)
        if func is functional.linear or func in MULTIPLYING or func in ADDING:
            return self._product(func, args, kwargs)
        result = func(*args, **kwargs)
        if not any(isinstance(each, torch.Tensor) for each in (result if isinstance(result, tuple) else (result,))):
            return result  # a shape, a type
        if func in INDEXING and view.index is None and (index := _number(func, args)) is not None:
            self._follow(result, replace(view, index=index))
        elif func in UNBINDING and view.index is None and not args[1:] and not kwargs:
            for index, part in enumerate(result):
                self._follow(part, replace(view, index=index))
        elif func in TURNING and result.shape[-2:] == args[0].shape[-2:][::-1]:
            self._follow(result, replace(view, turned=not view.turned))
        elif func in ALIKE and result.shape == args[0].shape:
            self._follow(result, view)
        else:
            self.unknown.setdefault(view.parameter, getattr(func, "__name__", str(func)))
        return result

    def _first(self, args: Any, kwargs: Any) -> _View | None:
        """Return the first argument that is followed."""
        return next(filter(None, map(self._view, (*args, *kwargs.values()))), None)

    def _view(self, arg: Any) -> _View | None:
        view = self.views.get(id(arg))
        return view if view is not None and view.tensor() is arg else None

    def _follow(self, tensor: torch.Tensor, view: _View) -> None:
        self.views[id(tensor)] = replace(view, tensor=weakref.ref(tensor))

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        operands = args[1:3] if func in ADDING else args[:2]
        view = self._view(operands[1]) if len(operands) == 2 else None
        if view is None:
            other = self._first(args, kwargs)
            assert other is not None
            self.unknown.setdefault(other.parameter, getattr(func, "__name__", str(func)))
            return func(*args, **kwargs)
        x, weight = operands
        turned = view.turned if func is functional.linear else not view.turned
        if view.index is not None:
            product = Product(view.parameter, view.index, turned, x.reshape(-1, x.shape[-1]))
            result = self.seen(product)
            result = func(*args, **kwargs) if result is None else result.reshape(*x.shape[:-1], -1)
            return self.given([product], result)
        if x.dim() != 3 or len(x) != len(weight):
            self.unknown.setdefault(view.parameter, getattr(func, "__name__", str(func)))
            return func(*args, **kwargs)
        products = [Product(view.parameter, index, turned, part) for index, part in enumerate(x)]
        found = [result for product in products if (result := self.seen(product)) is not None]
        return self.given(products, torch.stack(found) if len(found) == len(x) else func(*args, **kwargs))


def _number(func: Any, args: Any) -> int | None:
    """Return the one number that a tensor's first dimension is indexed by, None for any other index."""
    index = args[1]
    if func is not torch.Tensor.__getitem__:
        index = args[2] if len(args) == 3 and args[1] == 0 else None
    if isinstance(index, torch.Tensor) and index.dim() == 0 and not index.is_floating_point():
        index = index.item()
    return index if type(index) is int and index >= 0 else None


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Have the experts of a model computed one after the other within this context."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    key = "_experts_implementation"
    before = [(config, getattr(config, key)) for config in configs.values() if hasattr(config, key)]
    for config, _ in before:
        setattr(config, key, "eager")
    try:
        yield
    finally:
        for config, implementation in before:
            setattr(config, key, implementation)


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own 3-D parameters with more than one slice, by name; none of torch's own layers, whose 3-D
    parameters are kernels of convolutions."""
    if type(module).__module__.startswith("torch.nn."):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: parameter for name, parameter in own if parameter.dim() == 3 and len(parameter) > 1}
