"""Q of a layer under training: as small as it is stored, and a weight only while it is computed with."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from qinit.grids import Quantized

NIBBLE = 4  # bits: two codes to a byte


class DenseBase(nn.Module):
    """Q [out, in] as it is, in its own dtype. Nothing of it is trained."""

    stored: torch.Tensor
    stretch = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("stored", weight)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self.stored.to(dtype)


class CodedBase(nn.Module):
    """Q [out, in] as codes, two to a byte where they have 4 bits or fewer, zero points and scales s. `stretch`
    [out, groups] is trained: the scales are s exp(stretch), so that a step is in proportion to a scale and none changes
    its sign."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        assert quantized.zeros is not None
        self.group_size, self.inputs = quantized.group_size, quantized.codes.shape[1]
        self.paired = quantized.bits <= NIBBLE and self.inputs % 2 == 0
        codes = quantized.codes
        self.register_buffer("codes", codes[:, 0::2] | (codes[:, 1::2] << NIBBLE) if self.paired else codes)
        self.register_buffer("zeros", quantized.zeros)
        self.register_buffer("scales", quantized.scales.float())
        self.stretch = nn.Parameter(torch.zeros_like(self.scales))

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[0], self.inputs

    def stretched(self) -> torch.Tensor:
        """Return the scales [out, groups] as they are now, float32."""
        return self.scales * self.stretch.detach().exp()

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return Q [out, in], s (q - z), with the scales as they are now."""
        codes = self.codes
        if self.paired:
            codes = torch.stack([codes & 15, codes >> NIBBLE], dim=-1).flatten(1)
        grouped = functional.pad(codes, (0, -self.inputs % self.group_size)).unflatten(1, (-1, self.group_size))
        shifted = grouped.to(dtype).sub_(self.zeros[..., None].to(dtype))
        return shifted.mul_(self.stretched()[..., None].to(dtype)).flatten(1)[:, : self.inputs]

    def stretch_gradient(self, weight: torch.Tensor, of_weight: torch.Tensor) -> torch.Tensor:
        """Return the gradient [out, groups] from that of the weight: a scale's share of Q is Q itself."""
        product = functional.pad(weight * of_weight, (0, -self.inputs % self.group_size))
        return product.unflatten(1, (-1, self.group_size)).sum(-1, dtype=torch.float32)


Base = DenseBase | CodedBase


def through(base: Base, x: torch.Tensor) -> torch.Tensor:
    """Return x Q' [..., out] for x [..., in]. Q is made when it is needed, once more in the pass back, and not kept."""
    return _Product.apply(x, base.stretch, base)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stretch, base):  # type: ignore[no-untyped-def]
        ctx.base = base
        ctx.save_for_backward(x if stretch is not None and stretch.requires_grad else None)
        return functional.linear(x, base.weight(x.dtype))

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        weight = ctx.base.weight(gradient.dtype)
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_stretch = None
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
            of_stretch = ctx.base.stretch_gradient(weight, of_weight)
        return of_x, of_stretch, None
