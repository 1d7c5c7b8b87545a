"""How far a model is run to find out how its blocks are called; what the calls give is seen in test_blocks.py."""

import pytest
import torch
from torch import nn

from qinit.stream.calls import NotStreamable
from qinit.stream.rows import Row

TOKENS = torch.zeros((2, 3), dtype=torch.int64)


class Block(nn.Module):
    """Adds what it is given; `hands_on` is what it returns beside its hidden states."""

    def __init__(self, hands_on=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.hands_on = hands_on

    def forward(self, hidden, other=None):
        hidden = hidden * self.scale if other is None else hidden + other
        return hidden if self.hands_on is None else (hidden, self.hands_on(hidden))


class Owner:
    """A model of two rows; what a block of the first returns beside its hidden states goes to the next, and twice the
    row's end to the blocks of the second one."""

    def __init__(self, hands_on=None, second=True):
        self.first = nn.ModuleList([Block(hands_on), Block(hands_on), Block(hands_on)])
        self.second = nn.ModuleList([Block(), Block()])
        self.rows = (Row(self, "first", self.first), Row(self, "second", self.second))
        self.runs_second = second
        self.loaded, self.announced = [], []

    def has(self, name):
        return True

    def read(self, name):
        self.loaded.append(name)
        return torch.ones(4)

    def announce(self, prefix):
        self.announced.append(prefix)

    def run(self, tokens, mask):
        hidden, other = torch.ones(*tokens.shape, 4), None
        for block in self.first:
            output = block(hidden, other)
            hidden, other = (output, None) if self.first[0].hands_on is None else output
        encoder, hidden = 2 * hidden, torch.zeros(*tokens.shape, 4)
        if self.runs_second:
            for block in self.second:
                hidden = block(hidden, encoder)
        return hidden


def test_blocks_are_not_run_to_know_how_they_are_called():
    owner = Owner()
    start = owner.rows[0].start(TOKENS, None)
    assert (len(start.calls), start.made, owner.loaded) == (3, [], [])
    assert torch.equal(start.hidden, torch.ones(2, 3, 4))


def test_a_second_row_starts_from_what_the_first_has_come_to():
    owner = Owner()
    end = torch.full((2, 3, 4), 5.0, requires_grad=True)
    start = owner.rows[1].start(TOKENS, None, [end])
    assert not start.hidden.any()
    assert torch.equal(start.made[0], torch.full((2, 3, 4), 10.0))
    start.made[0].sum().backward()
    assert torch.equal(end.grad, torch.full((2, 3, 4), 2.0))


def test_a_row_that_is_never_called_has_no_start():
    owner = Owner(second=False)
    assert owner.rows[1].start(TOKENS, None, [torch.ones(2, 3, 4)]) is None


def test_what_the_first_block_makes_for_the_others_is_made_by_it():
    owner = Owner(hands_on=lambda hidden: torch.full(hidden.shape[1:], 7.0))
    row = owner.rows[0]
    calls = row.start(TOKENS, None).calls
    assert row.others == 1
    assert [call.args[0] if call.args[0] is None else call.args[0].mean().item() for call in calls] == [None, 7, 7]
    found = calls[1](owner.first[1], torch.ones(2, 3, 4))
    assert torch.equal(found, torch.full((2, 3, 4), 8.0))


def test_blocks_that_hand_on_what_depends_on_their_hidden_states_are_refused():
    owner = Owner(hands_on=lambda hidden: hidden.mean(0))
    with pytest.raises(NotStreamable, match="hand on more than their hidden states"):
        owner.rows[0].start(TOKENS, None)


def test_the_next_block_is_fetched_while_one_is_at_work():
    owner = Owner()
    for index in range(3):
        owner.rows[0].load(index)
    assert owner.announced == ["first.1.", "first.2."]
