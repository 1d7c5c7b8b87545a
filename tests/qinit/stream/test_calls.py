import pytest
import torch

from qinit.stream.calls import Call, NotStreamable, Slot, alike


def grown(value):
    """A tensor that other blocks have made."""
    return (torch.tensor(value, requires_grad=True) * 1.0).view(-1)


def run(call):
    """Return what a block gets beside its hidden states."""
    got = []
    call(lambda *args, **kwargs: got.append((args, kwargs)) or args[0], torch.zeros(1))
    return got[0]


def test_what_other_blocks_have_made_is_parted_once_and_filled_in_again():
    encoder, mask = grown(2.0), torch.ones(2)
    made = []
    calls = [Call((torch.empty(0), mask, encoder), {"again": encoder, "more": [1]}).parted(made) for _ in range(2)]
    assert len(made) == 1
    assert made[0] is encoder
    args, kwargs = run(calls[1].filled([torch.tensor([5.0])]))
    assert args[1] is mask
    assert args[2].item() == kwargs["again"].item() == 5
    assert kwargs["more"] == [1]
    assert run(calls[0])[0][2] == Slot(0)  # filling one leaves it as it was


def test_it_is_not_looked_for_inside_of_other_arguments():
    with pytest.raises(NotStreamable, match="inside another argument"):
        Call((torch.empty(0), {"encoder": [grown(1.0)]}), {}).parted([])


def test_hidden_states_by_name_and_a_tuple_as_output():
    call = Call((), {"hidden_states": torch.empty(0), "n": 3})
    assert call(lambda hidden_states, n: (n * hidden_states, None), torch.ones(2)).tolist() == [3, 3]


def test_arguments_are_alike_to_the_last_number():
    one = {"mask": (torch.ones(2), None), "slot": Slot(0)}
    assert alike(one, {"mask": (torch.ones(2), None), "slot": Slot(0)})
    assert not alike(one, {"mask": (torch.zeros(2), None), "slot": Slot(0)})
