"""What the adapter's arithmetic would take in energy: an estimate from operation counts and spike rates.

Constants: Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, for 32-bit floats in 45 nm:
a multiplication 3.7 pJ, an addition 0.9 pJ. They are those of the literature on spiking networks. Memory traffic, which
costs more than the arithmetic, is left out, and so is the base, whose operations are far more and which spikes do not
change. No machine here was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qinit.snndlft.layers import Layer

MULTIPLY, ADD = 3.7e-12, 0.9e-12  # joules


@dataclass(frozen=True)
class Energy:
    """Joules for each token that goes through the adapters: `spiking`, and `dense` for these ranks without spikes."""

    spiking: float
    dense: float


def energy(layers: list[Layer], rates: Mapping[str, float], time_steps: int) -> Energy:
    """Estimate from the triplets in use and each layer's spike rate (`rates`, by layer).

    Dense, a triplet multiplies and adds once for each input (Q) and each output (P). Spiking, Q is the same, as its
    inputs are no spikes; a neuron multiplies and adds once in each time step (leak and current); and a spike adds a
    column of P Lambda: rate * time_steps additions for each output.
    """
    both = MULTIPLY + ADD
    spiking = dense = 0.0
    for layer in layers:
        rate = rates.get(layer.name, 0.0)
        for parts in layer.modules.values():
            used = int((parts["lora_E"] != 0).sum())
            inputs, outputs = parts["lora_A"].shape[1], parts["lora_B"].shape[0]
            dense += used * (inputs + outputs) * both
            spiking += used * ((inputs + time_steps) * both + rate * time_steps * outputs * ADD)
    return Energy(spiking, dense)
