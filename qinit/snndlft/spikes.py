"""The branch of an AdaLoRA layer in which spikes go from Q to P. The neurons are snntorch's."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer, SVDConv2d
from torch import nn

from qinit.errors import QinitError, RecipeError, TargetError
from qinit.recipe_files import NOT_LINEAR

INSTALL = 'pip install "qinit[snn]"'


def leaky(decay: float, threshold: float) -> nn.Module:
    """Return a leaky integrate-and-fire neuron: snntorch's Leaky, its reset by subtraction and its arctan surrogate
    gradient (arXiv:2109.12894). Raises RecipeError where snntorch is not installed."""
    try:
        import snntorch
    except ImportError as error:
        raise RecipeError(f"spiking: snntorch cannot be imported ({error}); {INSTALL}, or --no-spiking") from None
    neuron = snntorch.Leaky(beta=decay, threshold=threshold, reset_mechanism="subtract")
    snntorch.SpikingNeuron.instances.remove(neuron)  # a list of the class that would keep it for good
    return neuron


class SpikingBranch:
    """Mixed into any of PEFT's AdaLoRA layers, in the place of its forward:

        y = base(x) + lora_alpha / init_r * P Lambda mean_t s_t,   s_t = LIF(Q x / rms(x)),   t = 1 .. time_steps

    The same current goes in at every step. It has about unit variance in every layer, as x, a token, is divided by its
    root mean square, and a row of Q by its norm: Q's rows count as the unit vectors that AdaLoRA's regularizer makes of
    them. Lambda comes after the spikes: these are 0 or 1, P Lambda is one matrix, and a start with Lambda = 0 adds
    nothing yet has gradients. `fired` counts the spikes of each triplet [r], `chances` how many there could have
    been of each.
    """

    time_steps: int
    neuron: nn.Module
    fired: torch.Tensor
    chances: int

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                result = result + self._spiking(adapter, x).to(result.dtype)
        return result

    def _spiking(self: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
        A, B, E = self.lora_A[adapter], self.lora_B[adapter], self.lora_E[adapter]
        x = self.lora_dropout[adapter](x.to(A.dtype))
        current = nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) @ nn.functional.normalize(A, dim=1).T
        potential, total = torch.zeros_like(current), torch.zeros_like(current)
        for _ in range(self.time_steps):
            spikes, potential = self.neuron(current, potential)
            total = total + spikes
        self.neuron.mem, self.neuron.reset = current.new_zeros(0), None  # they would keep the graph
        self._count(total.detach())
        scale = self.scaling[adapter] / (self.ranknum[adapter] + 1e-5)  # as AdaLoRA has it
        return (total / self.time_steps * E.T) @ B.T * scale

    def _count(self: Any, total: torch.Tensor) -> None:
        fired = total.flatten(0, -2).sum(0, dtype=torch.float64)
        if self.fired.shape != fired.shape:
            self.fired, self.chances = torch.zeros_like(fired), 0
        self.fired = self.fired.to(fired.device) + fired
        self.chances += self.time_steps * (total.numel() // max(1, total.shape[-1]))

    def merge(self, *_: Any, **__: Any) -> None:
        raise QinitError(NOT_LINEAR)

    def get_delta_weight(self, *_: Any) -> torch.Tensor:
        raise QinitError(NOT_LINEAR)


def add_spikes(layer: Any, time_steps: int, decay: float, threshold: float) -> Any:
    """Make an AdaLoRA layer of PEFT's, of any kind of base, a spiking one, in place. Raises TargetError for a
    convolution, whose rank space is an image."""
    if isinstance(layer, SVDConv2d):
        raise TargetError("target_modules: a spiking adapter goes on linear layers, found a convolution; leave it out")
    kind: type = type(layer)
    layer.__class__ = _spiking_class(kind)
    layer.neuron, layer.time_steps = leaky(decay, threshold), time_steps
    layer.fired, layer.chances = torch.zeros(0, dtype=torch.float64), 0
    return layer


@cache
def _spiking_class(kind: type) -> type:
    return type(f"Spiking{kind.__name__}", (SpikingBranch, kind), {})


def spike_rates(model: nn.Module, *, reset: bool = False) -> dict[str, float]:
    """Return each spiking layer's rate since the last reset: spikes for each neuron and time step, 0 to 1, over the
    triplets whose Lambda is not zero (all, where none has begun to train). Layers that have not run are left out;
    padding counts as tokens."""
    rates = {}
    for name, layer in spiking_layers(model).items():
        active = torch.cat([E.detach().flatten() for E in layer.lora_E.values()]).to(layer.fired.device) != 0
        if layer.chances and len(active) == len(layer.fired) > 0:
            chosen = layer.fired[active] if bool(active.any()) else layer.fired
            rates[name] = float(chosen.mean()) / layer.chances
        if reset:
            layer.fired, layer.chances = torch.zeros_like(layer.fired), 0
    return rates


def spiking_layers(model: nn.Module) -> dict[str, Any]:
    """Return the spiking layers by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SpikingBranch) and isinstance(module, AdaLoraLayer)
    }
