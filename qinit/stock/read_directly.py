"""Linear modules whose weight the model reads without calling them: a probe pass of the skeleton finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Inputs = Mapping[str, torch.Tensor]
EXPERTS = (None, "batched_mm")  # those of the configuration route by values, which meta tensors have not
SMALL_BYTES = 256 << 20  # of a model that is run for real, on zeros, where no pass without values gets through
# What is asked of a tensor that has no values.
# These take a second tensor for its type, place or shape alone.
ANSWERS = {"__bool__": True, "item": 1, "__int__": 1, "__index__": 1, "__float__": 1.0}
TAKE_NO_VALUES = {"to", "type_as", "view_as", "reshape_as", "expand_as", "zeros_like", "ones_like", "empty_like"}


def read_directly(
    model: Any, linear: Mapping[str, nn.Module], trials: Sequence[Inputs], rebuilt: Callable[[], Any]
) -> set[str]:
    """Return the names of those `linear` modules of a model on the meta device whose weight is used in a forward pass
    while their own forward is never called: what an adapter adds to that would have no effect. `trials` are what the
    model may take, the likeliest first.

    Modules that a pass on a few tokens does not reach are not among them. None are found where no pass gets to its
    end; a small model is then `rebuilt`, with its buffers, and run on zeros.
    """
    for inputs in trials:
        nothing = {name: value.to("meta") for name, value in inputs.items()}
        for experts in EXPERTS:
            if experts is not None and not _set_experts(model, experts):
                continue
            found = _probed(model, linear, nothing)
            if found is not None:
                return found
    if sum(parameter.nbytes for parameter in model.parameters()) > SMALL_BYTES:
        return set()
    return _on_zeros(rebuilt(), list(linear), trials)


def _on_zeros(model: Any, names: list[str], trials: Sequence[Inputs]) -> set[str]:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
    model.tie_weights()
    linear = {name: model.get_submodule(name) for name in names}
    found = (
        _probed(model, linear, {name: torch.zeros_like(value) for name, value in inputs.items()}) for inputs in trials
    )
    return next((names for names in found if names is not None), set())


def _set_experts(model: Any, name: str) -> bool:
    try:
        model.set_experts_implementation(name)
    except Exception:  # an older transformers, or a model without such experts
        return False
    return True


def _probed(model: Any, linear: Mapping[str, nn.Module], inputs: Inputs) -> set[str] | None:
    """Return what one pass finds, None where it does not get to its end."""
    watch = _Watch(linear)
    with watch.hooked():
        return watch.used - watch.called if runs_through(model, inputs, watch) else None


def runs_through(model: Any, inputs: Inputs, watch: TorchFunctionMode) -> bool:
    """Run a model without values while a mode watches; returns whether it got to its end."""
    training = model.training
    model.train()  # in eval mode torch may take fused kernels that are handed all weights
    try:
        with watch, torch.random.fork_rng(devices=[]):
            model(**inputs, use_cache=False) if "input_ids" in inputs else model(**inputs)
    except Exception:  # a model can do anything with tensors that have no values
        return False
    finally:
        model.train(training)
    return True


class _Watch(TorchFunctionMode):
    """Notes the weights that functions are given while the module that each belongs to is not running."""

    def __init__(self, linear: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.linear = linear
        self.names = {id(module.weight): name for name, module in linear.items()}
        self.running: list[str] = []
        self.called: set[str] = set()
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = answered(func, args, kwargs)
        if any(True for _ in tensors_in(result)):  # else a shape, a type or a device was asked for
            name = getattr(func, "__name__", "")
            given = args[:1] if name in TAKE_NO_VALUES and not name.endswith("_like") else args
            given = () if name.endswith("_like") else (given, kwargs)
            found = {self.names[id(tensor)] for tensor in tensors_in(given) if id(tensor) in self.names}
            self.used |= found.difference(self.running)
        return result

    def hooked(self) -> Any:
        return _Hooks(self)


def answered(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function; where it asks a tensor without values for one, answer that all is true, one, or nowhere."""
    name, first = getattr(func, "__name__", ""), args[0] if args else None
    if isinstance(first, torch.Tensor) and first.is_meta and len(args) == 1:
        if name in ANSWERS:
            return ANSWERS[name]
        if name == "nonzero":
            nowhere = torch.empty(0, first.dim(), dtype=torch.long, device="meta")
            return nowhere.unbind(1) if kwargs.get("as_tuple") else nowhere
        if name == "where":
            return torch.empty(0, first.dim(), dtype=torch.long, device="meta").unbind(1)
    return func(*args, **kwargs)


class _Hooks:
    """Tells a watch which linear modules are running."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def __enter__(self) -> None:
        self.handles = []
        for name, module in self.watch.linear.items():
            self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self.handles.append(module.register_forward_hook(lambda *_, name=name: self._leave(name)))

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, name: str) -> None:
        self.watch.called.add(name)
        self.watch.running.append(name)

    def _leave(self, name: str) -> None:
        self.watch.running.remove(name)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value: itself, or those in its lists, tuples and dictionaries, all the way down."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
