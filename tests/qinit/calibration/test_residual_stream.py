"""What a layer writes to, of blocks that are made up; real ones are in test_walk.py."""

import pytest
import torch
from torch import nn

from qinit.calibration.residual_stream import writes_to
from qinit.stream.calls import Call
from tests.helpers import gauss

WIDTH = 8


class Block(nn.Module):
    """`attend` and `expand` are the layers in question; `kind` says how a block puts them together."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.attend, self.expand = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden, flat=False):
        if flat:
            return self(hidden.reshape(-1, WIDTH)).view(hidden.shape)
        attended = self.attend(self.norm(hidden))
        if self.kind == "one after the other":
            hidden = hidden + attended
            return hidden + self.expand(self.norm(hidden))
        if self.kind == "side by side":
            return hidden + attended + self.expand(self.norm(hidden))
        if self.kind == "scaled":
            hidden = hidden + 0.5 * attended
            return hidden + 0.5 * self.expand(self.norm(hidden))
        if self.kind == "normalised behind":
            hidden = self.norm(hidden + attended)
            return self.norm(hidden + self.expand(hidden))
        return self.expand(self.norm(attended))  # no residual stream at all


@pytest.mark.parametrize(
    ("kind", "attend", "expand"),
    [
        ("one after the other", "input", "output"),
        ("side by side", "output", "output"),
        ("scaled", None, None),
        ("normalised behind", "input", None),
        ("none", None, "output"),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
@torch.no_grad()
def test_it_is_found_out_by_experiment(kind, attend, expand, flat):
    block, hidden = Block(kind), gauss(3, 5, WIDTH)
    call = Call((hidden,), {"flat": flat})
    assert writes_to(block, block.attend, call, hidden) == attend
    assert writes_to(block, block.expand, call, hidden) == expand
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


@torch.no_grad()
def test_a_layer_can_be_added_to_what_another_one_reads():
    block, hidden = Block("normalised behind"), gauss(3, 5, WIDTH)
    assert writes_to(block, block.expand, Call((hidden,), {}), hidden, ["attend", "expand"]) == "expand"
    block.kind = "scaled"
    assert writes_to(block, block.expand, Call((hidden,), {}), hidden, ["attend", "expand"]) is None


@torch.no_grad()
def test_a_layer_of_another_width_writes_to_nothing():
    block = Block("one after the other")
    block.narrow = nn.Linear(WIDTH, WIDTH // 2)
    hidden = gauss(3, 5, WIDTH)
    assert writes_to(block, block.narrow, Call((hidden,), {}), hidden) is None


@torch.no_grad()
def test_a_block_that_overflows_tells_nothing():
    block, hidden = Block("one after the other"), gauss(3, 5, WIDTH)
    block.attend.weight.fill_(float("inf"))
    assert writes_to(block, block.expand, Call((hidden,), {}), hidden) is None


@torch.no_grad()
def test_the_block_gives_the_same_afterwards_and_chance_is_the_caller_s():
    block, hidden = Block("one after the other"), gauss(3, 5, WIDTH)
    before, state = block(hidden), torch.get_rng_state()
    for _ in range(2):
        writes_to(block, block.attend, Call((hidden,), {}), hidden)
    assert torch.equal(block(hidden), before)
    assert torch.equal(torch.get_rng_state(), state)
