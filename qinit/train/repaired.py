"""A linear layer on Q and B A, as it is trained."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from qinit.linalg.low_rank import LowRank
from qinit.train.bases import Base, through

FLOOR = 0.01  # of the largest singular value of B A: no direction starts smaller, so that none is dead


class Repaired(nn.Module):
    """A linear layer x -> x Q' + (x A') B' + bias on a base that has Q [out, in]; B and A are parameters in float32,
    None for Q alone. They start balanced: B = U sqrt(S), A = sqrt(S) V' for B A = U S V'."""

    def __init__(self, base: Base, bias: torch.Tensor | None, low_rank: LowRank | None) -> None:
        super().__init__()
        self.base, self.bias = base, bias
        self.B = self.A = None
        if low_rank is not None:
            weight = base.weight(torch.float32)
            B, A, self.size = _balanced(low_rank, weight)
            self.B, self.A = nn.Parameter(B.to(weight.device)), nn.Parameter(A.to(weight.device))

    @property
    def weight(self) -> torch.Tensor:
        """Q in float32: some models look at their layers' weights."""
        return self.base.weight(torch.float32)

    def sizes(self) -> list[tuple[nn.Parameter, float]]:
        """Return B and A, each with the size of an entry: what a learning rate is in proportion to."""
        if self.B is None or self.A is None:
            return []
        return [(self.B, self.size / math.sqrt(len(self.B))), (self.A, self.size / math.sqrt(self.A.shape[1]))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = through(self.base, x)
        if self.bias is not None:
            y = y + self.bias
        if self.B is None or self.A is None:
            return y
        return y + functional.linear(functional.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


def _balanced(low_rank: LowRank, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return B and A with the same product and the same share of each singular value, and the root mean square of
    their columns' and rows' norms.

    Directions that hold (almost) nothing get a unit of FLOOR in A all the same, and what is left in B: as in a plain
    LoRA start, where B is zero. With B A = 0, the scale is taken from Q.
    """
    left, left_r = torch.linalg.qr(low_rank.B.detach().float())
    right, right_r = torch.linalg.qr(low_rank.A.detach().float().T)
    U, S, Vh = torch.linalg.svd(left_r @ right_r.T)
    top = float(S[0]) or float(weight.norm()) / math.sqrt(min(weight.shape)) or 1.0
    root = S.clamp(min=FLOOR * top).sqrt()
    return left @ U * (S / root), root[:, None] * (Vh @ right.T), float(root.square().mean().sqrt())
