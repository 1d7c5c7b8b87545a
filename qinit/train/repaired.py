"""A linear layer on Q and B A, and a model of them that shares all else with the source."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qinit.linalg.low_rank import LowRank

FLOOR = 0.01  # of the largest singular value of B A: no direction starts smaller, so that none is dead


class Repaired(nn.Module):
    """A linear layer x -> x Q' + (x A') B' + bias with Q [out, in] frozen, in its own dtype; B and A are parameters,
    None for Q alone. They start balanced: B = U sqrt(S), A = sqrt(S) V' for B A = U S V'."""

    base: torch.Tensor

    def __init__(self, base: torch.Tensor, bias: torch.Tensor | None, low_rank: LowRank | None) -> None:
        super().__init__()
        self.register_buffer("base", base)
        self.bias = bias
        self.B = self.A = None
        if low_rank is not None:
            B, A, self.size = _balanced(low_rank, base)
            self.B, self.A = nn.Parameter(B.to(base.device)), nn.Parameter(A.to(base.device))

    @property
    def weight(self) -> torch.Tensor:
        """Q in float32: some models look at their layers' weights."""
        return self.base.float()

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups for B and A, with the rate times the size of an entry."""
        assert self.B is not None
        assert self.A is not None
        return [
            {"params": [self.B], "lr": learning_rate * self.size / math.sqrt(len(self.B))},
            {"params": [self.A], "lr": learning_rate * self.size / math.sqrt(self.A.shape[1])},
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, self.weight, self.bias)
        if self.B is None or self.A is None:
            return y
        return y + functional.linear(functional.linear(x, self.A), self.B)


def _balanced(low_rank: LowRank, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return B and A with the same product and the same share of each singular value, and the root mean square of
    their columns' and rows' norms.

    Directions that hold (almost) nothing get a unit of FLOOR in A all the same, and what is left in B: as in a plain
    LoRA start, where B is zero. With B A = 0, the scale is taken from Q.
    """
    left, left_r = torch.linalg.qr(low_rank.B.detach().float())
    right, right_r = torch.linalg.qr(low_rank.A.detach().float().T)
    U, S, Vh = torch.linalg.svd(left_r @ right_r.T)
    top = float(S[0]) or float(base.float().norm()) / math.sqrt(min(base.shape)) or 1.0
    root = S.clamp(min=FLOOR * top).sqrt()
    return left @ U * (S / root), root[:, None] * (Vh @ right.T), float(root.square().mean().sqrt())


def _make_student(
    teacher: Any, bases: dict[str, torch.Tensor], factors: dict[str, LowRank], device: torch.device
) -> Any:
    """Return a copy of the model that shares every tensor with it but the targets, which run on Q and B A."""
    from transformers.pytorch_utils import Conv1D

    shared = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
    student = copy.deepcopy(teacher, shared)
    for name in {**bases, **factors}:
        linear = student.get_submodule(name)
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        repaired = Repaired(bases.get(name, weight.detach()).to(device), linear.bias, factors.get(name))
        parent, _, last = name.rpartition(".")
        setattr(student.get_submodule(parent), last, repaired)
    if student.supports_gradient_checkpointing:
        # Its name before transformers 5.
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
        for module in student.modules():  # only these look whether they are trained; all below them stay in eval mode
            module.training = bool(getattr(module, "gradient_checkpointing", False))
    return student
