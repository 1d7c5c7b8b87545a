import pytest
import torch
from torch import nn

from qinit.snndlft.energy import energy
from qinit.snndlft.layers import Layer


def test_spikes_save_multiplications_on_the_way_out_alone():
    E = nn.Parameter(torch.tensor([[1.0], [0.0], [2.0]]))
    parts = {"lora_A": nn.Parameter(torch.zeros(3, 10)), "lora_E": E, "lora_B": nn.Parameter(torch.zeros(20, 3))}
    found = energy([Layer("a", {"a.q": parts})], {"a": 0.25}, 4)
    assert found.dense == pytest.approx(2 * 30 * 4.6e-12)
    assert found.spiking == pytest.approx(2 * (14 * 4.6e-12 + 0.25 * 4 * 20 * 0.9e-12))
