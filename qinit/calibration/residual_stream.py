"""Where a layer writes to: found out by experiment, not by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qinit.stream.calls import Call


def writes_to(block: nn.Module, linear: nn.Module, call: Call, hidden: torch.Tensor) -> str | None:
    """Find out by experiment what a linear's output is added to.

    `output`: a change of it arrives unchanged at the block's output. `input`: all that follows depends on its sum
    with the block's input alone, so with the sum held, another input gives the same output.
    """

    def run(x: torch.Tensor, change: Any) -> torch.Tensor:
        hook = linear.register_forward_hook(lambda _module, _args, output: change(output, x))
        try:
            return call(block, x)
        finally:
            hook.remove()

    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(hidden.shape, generator=generator).to(hidden.device) * hidden.std()
    plain = run(hidden, lambda output, x: output)
    if plain.shape != hidden.shape or not torch.isfinite(plain).all():
        return None
    shifted = run(hidden, lambda output, x: output + shift.view_as(output) if _alike(output, shift) else output)
    if torch.allclose(shifted - plain, shift, atol=1e-3 * float(shift.std() + plain.std()), rtol=1e-3):
        return "output"
    one, other = (
        run(x, lambda output, x: (shift - x).view_as(output) if _alike(output, x) else output) for x in (hidden, shift)
    )
    return "input" if torch.allclose(one, other, atol=1e-3 * float(one.std()), rtol=1e-3) else None


def _alike(output: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether a linear's output has a row for every token, [batch, length, width] or flat."""
    return output.shape[-1] == hidden.shape[-1] and output.numel() == hidden.numel()
