import pytest
import torch
from torch import nn

from qinit.calibration import activations
from qinit.calibration.activations import (
    batch_size,
    caught,
    caught_at,
    oriented,
    require_finite_input,
    rows_of,
    unpadded,
)
from qinit.errors import CalibrationError
from qinit.stream.calls import Call
from tests.helpers import calibrated_plan, gauss, plan_of, random_samples
from tests.models import make_checkpoint

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_batches_are_as_large_as_the_widest_activation_allows(llama, monkeypatch):
    plan, samples = calibrated_plan(llama), random_samples(count=7, length=12)
    widest = 128 * 12 * 4  # bytes of one sample in front of down_proj
    for room, expected in ((0, 1), (widest, 1), (3 * widest + 5, 3), (100 * widest, 7)):
        monkeypatch.setattr(activations, "BATCH_BYTES", {"cpu": room})
        assert batch_size(plan, samples, torch.device("cpu")) == expected


def test_padding_is_taken_out_of_what_has_a_row_for_every_token():
    x = torch.arange(24.0).view(2, 3, 4)
    kept = x.reshape(6, 4)[[0, 1, 3]]
    assert torch.equal(unpadded(x, MASK), kept)
    assert torch.equal(unpadded(x.reshape(6, 4), MASK), kept)  # flat, as OPT's are
    assert torch.equal(unpadded(x, None), rows_of(x))
    some = x.reshape(6, 4)[:5]  # an expert's: which tokens they are cannot be told
    assert torch.equal(unpadded(some, MASK), some)


class TestFinite:
    def test_what_is_finite_passes_though_its_sum_is_not(self):
        require_finite_input(torch.full((2, 3, 4), 3e38), "x", 0, random_samples())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_names_the_layer_and_the_sample(self, value):
        x = torch.zeros(2, 3, 4)
        x[1, 2, 0] = value
        with pytest.raises(CalibrationError, match=r"mlp\.up: NaN or Inf at its input in sample 8 of .*\(a test\)"):
            require_finite_input(x, "mlp.up", 7, random_samples())
        with pytest.raises(CalibrationError, match=r"mlp\.up: NaN or Inf at its input of the calibration text"):
            require_finite_input(x.reshape(6, 4), "mlp.up", 7, random_samples())


def test_a_weight_is_turned_between_the_module_s_layout_and_outputs_by_inputs(tmp_path, llama):
    weight = gauss(192, 64)
    conv = plan_of(make_checkpoint(tmp_path / "m", "gpt2"), format="dense").layers[0]
    turned = oriented(weight.T.contiguous(), conv)
    assert torch.equal(turned, weight)
    assert turned.is_contiguous()
    assert oriented(weight, plan_of(llama).layers[0]) is weight


class Block(nn.Module):
    """Three layers in a row, of which the last may fail."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
        self.reached = 0

    def forward(self, hidden):
        hidden = self.two(self.one(hidden).relu())
        self.reached += 1
        return self.three(hidden.tanh())


def hooks_of(block):
    return [hook for module in block.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


@torch.no_grad()
def test_a_block_runs_to_its_end_and_its_layers_inputs_are_caught():
    torch.manual_seed(0)
    block, hidden = Block(), gauss(2, 3, 4)
    inputs, end = caught(block, Call((hidden,), {}), hidden, {"two", "one"})
    assert list(inputs) == ["one", "two"]
    assert inputs["one"] is hidden
    assert torch.equal(inputs["two"], block.one(hidden).relu())
    assert torch.equal(end, block(hidden))
    assert not hooks_of(block)


@torch.no_grad()
def test_a_block_runs_as_far_as_a_layer_that_itself_does_not_run():
    torch.manual_seed(0)
    block, hidden = Block(), gauss(2, 3, 4)
    ran = []
    block.two.register_forward_hook(lambda *_: ran.append("two"))
    inputs = caught_at(block, Call((hidden,), {}), hidden, "two", ["one"])
    assert torch.equal(inputs["one"], hidden)
    assert torch.equal(inputs["two"], block.one(hidden).relu())
    assert not ran
    assert not block.reached


@pytest.mark.parametrize("catch", [lambda *a: caught(*a, {"one"}), lambda *a: caught_at(*a, "three")])
def test_no_hook_is_left_after_an_error(catch):
    block = Block()
    with pytest.raises(RuntimeError):
        catch(block, Call((None,), {}), torch.zeros(2, 3, 5))
    assert not hooks_of(block)
