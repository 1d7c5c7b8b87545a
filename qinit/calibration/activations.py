"""What layers read and give while a model runs: caught, freed of padding, checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from qinit.calibration.experts import listening, parameters_of
from qinit.errors import CalibrationError
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.stream.calls import Call, Stop
from qinit.stream.rows import frozen
from qinit.text.samples import Samples

# Of the widest activation of one batch. What is larger than the 32 MB that glibc keeps is given back and asked for anew
# with every operation: a quarter of a run's time on a CPU.
BATCH_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}


def batch_size(plan: Plan, samples: Samples, device: torch.device) -> int:
    """Return how many samples run at once, so that the widest activation takes BATCH_BYTES."""
    modules = [layer.target.module for layer in plan.quantized]
    widest = max(max(module.in_features, module.out_features) for module in modules)
    return max(1, min(len(samples.tokens), BATCH_BYTES[device.type] // (4 * widest * samples.tokens.shape[1])))


def unpadded(activation: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return [tokens, width], without the padding where the activation has a row for every token of a batch with
    `mask` [batch, length], be it [batch, length, width] or flat, as OPT's are."""
    rows = rows_of(activation)
    if mask is not None and len(rows) == mask.numel():
        return rows[mask.flatten().to(rows.device)]
    return rows


def rows_of(activation: torch.Tensor) -> torch.Tensor:
    """Return [tokens, width], padding included."""
    return activation.reshape(-1, activation.shape[-1])


def require_finite_input(activation: torch.Tensor, name: str, first: int, samples: Samples) -> None:
    """Raise CalibrationError, naming layer and sample, when an activation [batch, ...] holds NaN or Inf; `first` is
    the place of the batch's first sample."""
    if torch.isfinite(activation.sum()) or bool(torch.isfinite(activation).all()):
        return
    where = ""
    if activation.dim() > 2:
        bad = (~torch.isfinite(activation)).flatten(1).any(1).nonzero()[0]
        where = f" in sample {samples.number(first + int(bad))}"
    raise CalibrationError(
        f"{name}: NaN or Inf at its input{where} of the calibration text ({samples.origin}); the model overflows "
        "there: try other text, or --calibration none"
    )


def weight_in(root: nn.Module, inner: str, layer: LayerPlan) -> torch.Tensor:
    """Return a layer's weight [out, in] as it is in a module that has it under the name `inner`."""
    expert = layer.target.module.expert
    if expert is not None:
        return oriented(root.get_parameter(inner.rpartition("[")[0]).data[expert.index], layer)
    linear: Any = root.get_submodule(inner)
    return oriented(linear.weight.data, layer)


def put_weight(root: nn.Module, inner: str, layer: LayerPlan, weight: torch.Tensor) -> None:
    """Put `weight` [out, in] into its place."""
    expert = layer.target.module.expert
    if expert is not None:
        root.get_parameter(inner.rpartition("[")[0]).data[expert.index] = oriented(weight, layer)
        return
    linear: Any = root.get_submodule(inner)
    linear.weight.data = oriented(weight, layer)


def repairable(module: nn.Module, prefix: str, layers: Iterable[LayerPlan]) -> nn.Module:
    """Return a copy of a block, whose names begin with `prefix`, that has the weights in common until `put_weight` puts
    another in the place of one; not those of experts, which are written into one by one."""
    parts = {layer.target.module.parameter for layer in layers if layer.target.module.expert is not None}
    named = module.named_parameters()
    shared = {id(parameter): frozen(parameter.data) for name, parameter in named if prefix + name not in parts}
    return copy.deepcopy(module, shared)


def oriented(weight: torch.Tensor, layer: LayerPlan) -> torch.Tensor:
    """Turn a weight between [out, in] and the module's own layout (the same but for Conv1D)."""
    return weight.T.contiguous() if layer.target.module.transposed else weight


def keep_first(found: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    """A hook's way to keep what a module was given first: it returns nothing."""
    found.setdefault(name, value)


def caught(
    block: nn.Module, call: Call, hidden: torch.Tensor, wanted: Collection[str]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run a block and return the inputs of the `wanted` linears, in the order in which they ran, and the output; of
    experts those of one call."""
    inputs: dict[str, torch.Tensor] = {}
    parameters = parameters_of(wanted)
    with ExitStack() as hooks:
        if parameters:
            hooks.enter_context(listening(block, parameters, partial(keep_first, inputs), wanted))
        for name in wanted:
            if name.endswith("]"):
                continue
            hooks.enter_context(_before(block, name, partial(keep_first, inputs, name)))
        return inputs, call(block, hidden)


def caught_at(
    block: nn.Module, call: Call, hidden: torch.Tensor, name: str, others: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Run a block as far as one linear and return what that would read, and what `others` have read on the way; nothing
    of those that are not reached."""
    inputs: dict[str, torch.Tensor] = {}

    def stop(x: torch.Tensor) -> None:
        inputs[name] = x
        raise Stop

    with ExitStack() as hooks:
        for other in others:
            hooks.enter_context(_before(block, other, partial(keep_first, inputs, other)))
        hooks.enter_context(_before(block, name, stop))
        with suppress(Stop):
            call(block, hidden)
    return inputs


@contextmanager
def _before(block: nn.Module, name: str, do: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call `do` with a linear's input each time before it runs."""

    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        do(args[0])

    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
