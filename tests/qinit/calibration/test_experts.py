"""What experts read, against what their own module computes, and what is made of it."""

import pytest
import torch
from torch import nn

from qinit.calibration import experts as module
from qinit.calibration.experts import ExpertMeters, caught_by_experts, listening, parameters_of, portions
from qinit.stream.calls import Call
from tests.helpers import gauss, plan_of
from tests.models import make_float32

EXPERTS, WIDTH, INNER, TOKENS = 3, 4, 6, 9


class Experts(nn.Module):
    """Computes one expert after the other; of the last one no token asks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(gauss(EXPERTS, INNER, WIDTH))
        self.down = nn.Parameter(gauss(EXPERTS, INNER, WIDTH, seed=1))  # [in, out]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for index in range(EXPERTS - 1):
            chosen = torch.arange(len(x)) % (EXPERTS - 1) == index
            inner = torch.relu(nn.functional.linear(x[chosen], self.up[index]))
            out[chosen] += inner @ self.down[index]
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.behind(self.experts(hidden[0]))[None]

    def behind(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("what comes behind the experts is not computed")


def test_the_tokens_of_each_expert_are_caught_and_the_block_is_left_then():
    block, hidden = Block(), gauss(1, TOKENS, WIDTH, seed=2)
    up = caught_by_experts(block, Call((hidden,), {}), hidden, "experts.up")
    assert list(up) == ["experts.up[0]", "experts.up[1]"]
    assert all(torch.equal(up[f"experts.up[{i}]"], hidden[0, i::2]) for i in range(2))
    down = caught_by_experts(block, Call((hidden,), {}), hidden, "experts.down")
    for index in range(2):
        expected = torch.relu(hidden[0, index::2] @ block.experts.up[index].T)
        expected = expected[expected.any(-1)]  # a token that is zero tells nothing
        assert torch.allclose(down[f"experts.down[{index}]"], expected)


def test_only_wanted_experts_are_listened_to():
    block, hidden, seen = Block(), gauss(TOKENS, WIDTH, seed=2), []
    with listening(block, ["experts.up"], lambda name, x: seen.append(name), ["experts.up[1]"]):
        block.experts(hidden)
    assert seen == ["experts.up[1]"]
    assert parameters_of(["q_proj", "experts.up[0]", "experts.up[1]", "experts.down[0]"]) == [
        "experts.up",
        "experts.down",
    ]


@pytest.fixture
def layers(tmp_path):
    plan = plan_of(make_float32(tmp_path / "m", "mixtral"), format="dense", group_size=32)
    name = "model.layers.0.mlp.experts.down_proj"
    return [layer for layer in plan.quantized if layer.target.module.parameter == name]


def test_an_expert_is_shrunk_towards_all_by_as_many_tokens_as_it_has_inputs(layers):
    inputs = layers[0].target.module.in_features
    seen = {0: gauss(40, inputs, seed=1), 1: gauss(4 * inputs, inputs, seed=2), 2: gauss(30, inputs, seed=3)}
    meters = ExpertMeters(layers, torch.device("cpu"))
    for index, x in seen.items():
        meters.add(layers[index].target.name, x)
    everything = torch.cat(list(seen.values()))
    pool = everything.T @ everything / len(everything)
    for index, x in seen.items():
        found = meters.statistics(layers[index])
        shared = min(inputs, len(everything) - len(x))
        expected = (x.T @ x + shared * pool) / (len(x) + shared)
        assert (found.tokens, found.shared) == (len(x), shared)
        assert torch.allclose(found.hessian, expected, atol=1e-4)
    assert meters.statistics(layers[3]) is None


def test_portions_give_what_all_at_once_do(layers, monkeypatch):
    x = gauss(50, layers[0].target.module.in_features)
    whole = ExpertMeters(layers, torch.device("cpu"))
    for layer in layers[:3]:
        whole.add(layer.target.name, x)
    monkeypatch.setattr(module, "PORTION_BYTES", 2 * 4 * layers[0].target.module.in_features ** 2)
    parts = portions(layers)
    assert [len(part) for part in parts] == [2, 2]
    pool = None
    for part in parts:
        some = ExpertMeters(part, torch.device("cpu"), pool)
        for layer in layers[:3]:
            some.add(layer.target.name, x)
        pool = some.pool
        for layer in part:
            one, other = some.statistics(layer), whole.statistics(layer)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one.hessian, other.hessian)
