"""Where a layer writes to: found out by experiment, not by name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from qinit.calibration.activations import keep_first
from qinit.stream.calls import Call


def writes_to(
    block: nn.Module, linear: nn.Module, call: Call, hidden: torch.Tensor, before: Sequence[str] = ()
) -> str | None:
    """Find out by experiment what a linear's output is added to.

    `output`: a change of it arrives unchanged at the block's output. `input`: all that follows depends on its sum
    with the block's input alone, so with the sum held, another input gives the same output. Else one of `before`, the
    names of linears that run before it, the same with what that one reads: BERT's MLP is added to what it reads.
    """

    def run(x: torch.Tensor, change: Any, read_by: str | None = None) -> torch.Tensor:
        found: dict[str, torch.Tensor] = {} if read_by else {"": x}
        with ExitStack() as hooks:
            if read_by:
                reader = block.get_submodule(read_by)
                hook = reader.register_forward_pre_hook(lambda _, args: keep_first(found, "", args[0]))
                hooks.callback(hook.remove)
            hook = linear.register_forward_hook(lambda _module, _args, output: change(output, found.get("", x)))
            hooks.callback(hook.remove)
            return call(block, x)

    def held(read_by: str | None) -> bool:
        def hold(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return (shift - x.view_as(shift)).view_as(output) if _alike(output, x) else output

        one, other = (run(x, hold, read_by) for x in (hidden, shift))
        return torch.allclose(one, other, atol=1e-3 * float(one.std()), rtol=1e-3)

    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(hidden.shape, generator=generator).to(hidden.device) * hidden.std()
    plain = run(hidden, lambda output, x: output)
    if plain.shape != hidden.shape or not torch.isfinite(plain).all():
        return None
    shifted = run(hidden, lambda output, x: output + shift.view_as(output) if _alike(output, shift) else output)
    if torch.allclose(shifted - plain, shift, atol=1e-3 * float(shift.std() + plain.std()), rtol=1e-3):
        return "output"
    if held(None):
        return "input"
    return next((name for name in before if held(name)), None)


def _alike(output: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether a linear's output has a row for every token, [batch, length, width] or flat."""
    return output.shape[-1] == hidden.shape[-1] and output.numel() == hidden.numel()
