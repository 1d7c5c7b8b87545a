from dataclasses import replace

import pytest
import torch

from qinit.calibration.groups import Group, Groups
from qinit.files.tensors import StoredTensor
from qinit.plan.parts import LayerPlan
from qinit.source.targets import Expert, LinearModule, Target

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


def test_experts_of_a_parameter_are_one_group_from_the_first_of_them_on(monkeypatch):
    experts = {f"experts.up[{i}]": expert(f"blocks.0.experts.up[{i}]", i) for i in range(3)}
    found = Groups({"q": layer("blocks.0.q"), **experts}, lambda inner: pytest.fail(inner) if "up" in inner else None)
    found.add({"q": X, "experts.up[1]": Y})
    found.add({"experts.up[0]": X})
    assert inner_of(found) == [["q"], ["experts.up[0]", "experts.up[1]", "experts.up[2]"]]
    assert [group.stack for group in found.found] == [None, "experts.up"]
    assert not found.found[1].at_end
    assert not found.unreached


def test_groups_that_parts_of_a_text_have_found_are_those_of_the_whole_text():
    batches = [{"a": X, "b": X}, {"c": Y, "b": X}, {"d": Y, "c": Y, "e[1]": X}]
    layers = {
        **{name: layer(f"blocks.0.{name}") for name in "abcd"},
        "e[0]": expert("e[0]", 0),
        "e[1]": expert("e[1]", 1),
    }
    whole, *parts = (Groups(layers, lambda inner: inner) for _ in range(4))
    for batch, part in zip(batches, parts, strict=True):
        whole.add(batch)
        part.add(batch)
    for part in parts:
        joined = part.joined([one.names for one in parts])
        assert joined.names == whole.names == [["a", "b"], ["c", "d"], ["e[0]"]]
        assert [group.writes for group in joined.found] == [group.writes for group in whole.found]
    assert whole.joined([whole.names] * 2) is whole


def expert(name, index):
    made = layer(name)
    module = replace(made.target.module, expert=Expert(index, count=3, behind=0, told=False))
    return replace(made, target=replace(made.target, module=module))
