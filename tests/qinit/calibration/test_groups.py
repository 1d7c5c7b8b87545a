import torch

from qinit.calibration.groups import Group, Groups
from qinit.files.tensors import StoredTensor
from qinit.plan.plan import LayerPlan
from qinit.source.targets import LinearModule, Target

X, Y = torch.zeros(2), torch.ones(2)


def layer(name):
    tensor = StoredTensor.__new__(StoredTensor)  # never read
    return LayerPlan(Target(LinearModule(name, 2, 2, False), tensor), 2, 2, 1, None, ())


def groups(*names, writes=lambda inner: None):
    return Groups({name: layer(f"blocks.0.{name}") for name in names}, writes)


def inner_of(found):
    return [[layer.target.name.removeprefix("blocks.0.") for layer in group.layers] for group in found.found]


def test_layers_that_read_the_same_tensor_are_one_group_in_the_order_in_which_they_ran():
    found = groups("down", "k", "q")
    found.add({"q": X, "k": X, "down": Y})
    assert inner_of(found) == [["q", "k"], ["down"]]
    assert [group.inner for group in found.found] == ["q", "down"]
    assert not found.unreached


def test_equal_values_are_not_one_input():
    found = groups("q", "k")
    found.add({"q": X, "k": X.clone()})
    assert inner_of(found) == [["q"], ["k"]]


def test_a_layer_that_another_batch_reaches_comes_behind_those_of_the_first():
    found = groups("expert.0", "expert.1", "expert.2")
    found.add({"expert.1": X})
    found.add({"expert.0": Y, "expert.1": X})
    assert inner_of(found) == [["expert.1"], ["expert.0"]]
    assert [layer.target.name for layer in found.unreached] == ["blocks.0.expert.2"]


def test_what_a_layer_writes_to_is_asked_once():
    asked = []
    found = groups("q", "down", writes=lambda inner: asked.append(inner) or ("output" if inner == "down" else None))
    for _ in range(3):
        found.add({"q": X, "down": Y})
    assert asked == ["q", "down"]
    assert [group.at_end for group in found.found] == [False, True]


def test_a_group_is_at_the_end_if_all_of_its_layers_are():
    assert Group("a", [], {"a": "output", "b": "output"}).at_end
    assert not Group("a", [], {"a": "output", "b": None}).at_end
    assert not Group("a", []).at_end
