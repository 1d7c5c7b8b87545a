import copy
import sys

import pytest
import torch

from qinit.errors import QinitError, RecipeError, TargetError
from tests.helpers import gauss
from tests.qinit.snndlft import tiny


def layer(**options):
    """One spiking layer with random Q, Lambda and P."""
    from qinit.snndlft.spikes import spiking_layers

    model = tiny.adapted(tiny.config(lora_alpha=8, **options))
    found = next(iter(spiking_layers(model).values()))
    found.lora_A["default"].data = gauss(4, 64, seed=1, scale=0.2)
    found.lora_E["default"].data = gauss(4, 1, seed=2)
    found.lora_B["default"].data = gauss(64, 4, seed=3)
    return found


@pytest.mark.usefixtures("snn")
@pytest.mark.parametrize("time_steps", [1, 5])
def test_spikes_of_leaky_neurons_go_from_q_to_p(time_steps):
    found, x = layer(time_steps=time_steps, decay=0.8, threshold=0.7), gauss(2, 3, 64)
    Q = found.lora_A["default"] / found.lora_A["default"].norm(dim=1, keepdim=True)
    current = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ Q.T
    potential, total = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    for _ in range(time_steps):
        potential = 0.8 * potential + current - 0.7 * (potential > 0.7)
        total += potential > 0.7
    assert 0 < total.sum() < total.numel() * time_steps
    branch = (total / time_steps * found.lora_E["default"].T) @ found.lora_B["default"].T * 8 / 4
    torch.testing.assert_close(found(x) - found.base_layer(x), branch, rtol=1e-4, atol=1e-5)
    assert found.chances == 6 * time_steps
    assert found.fired.tolist() == total.flatten(0, 1).sum(0).tolist()


@pytest.mark.usefixtures("snn")
def test_a_start_adds_nothing_and_has_gradients():
    model, plain = tiny.adapted(tiny.config()), tiny.base()
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    model(**{key: value[None] for key, value in tiny.examples()[0].items()}).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_E" in name]
    assert gradients
    assert all(grad.abs().sum() > 0 for grad in gradients)


@pytest.mark.usefixtures("snn")
def test_surrogate_gradients_reach_q_and_what_is_below():
    found, x = layer(), gauss(1, 3, 64).requires_grad_()
    found(x).sum().backward()
    assert found.lora_A["default"].grad.abs().sum() > 0
    copy.deepcopy(found)  # no graph is kept in it


@pytest.mark.usefixtures("snn")
def test_the_rate_is_that_of_triplets_in_use():
    from qinit.snndlft.spikes import spike_rates

    found = layer(time_steps=2, decay=0.0, threshold=0.5)
    found.lora_A["default"].data = torch.ones(4, 64) * torch.tensor([[1.0], [1.0], [-1.0], [1.0]])
    found.lora_E["default"].data = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    assert spike_rates(found) == {}
    found(torch.ones(1, 3, 64))
    assert spike_rates(found, reset=True) == {"": 0.5}  # the first always fires, the third never
    assert spike_rates(found) == {}


@pytest.mark.usefixtures("snn")
def test_it_cannot_be_merged():
    found = layer()
    for merge in (found.merge, found.get_delta_weight):
        with pytest.raises(QinitError, match="cannot be merged: between Q and P are neurons that fire"):
            merge("default")


@pytest.mark.usefixtures("snn")
def test_a_convolution_is_refused():
    from peft import AdaLoraConfig, get_peft_model

    from qinit.snndlft.spikes import add_spikes

    class Sees(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = torch.nn.Conv2d(8, 8, 3)

    model = get_peft_model(Sees(), AdaLoraConfig(total_step=2, init_r=4, target_modules=["seen"]))
    with pytest.raises(TargetError, match="found a convolution"):
        add_spikes(model.base_model.model.seen, 4, 0.9, 1.0)


def test_without_the_library_a_command_is_named(monkeypatch):
    from qinit.snndlft.spikes import leaky

    monkeypatch.setitem(sys.modules, "snntorch", None)
    with pytest.raises(RecipeError, match=r'pip install "qinit\[snn\]", or --no-spiking'):
        leaky(0.9, 1.0)
