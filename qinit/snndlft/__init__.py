"""SNN-DLFT: AdaLoRA whose rank-space activations are spikes, and that trains only the layers that matter.

    from qinit.snndlft import DynamicLayers, SnnDlftConfig, adapt, load

    config = SnnDlftConfig(layer_wise="half")
    model = adapt(base, config, "CAUSAL_LM")
    Trainer(model, args, train_dataset=..., callbacks=[DynamicLayers(config)]).train()
    model.save_pretrained("adapter")

The neurons are snntorch's (`pip install "qinit[snn]"`); ranks and importance are PEFT's AdaLoRA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qinit.snndlft.callback import DynamicLayers
    from qinit.snndlft.config import SnnDlftConfig
    from qinit.snndlft.model import adapt, load
    from qinit.snndlft.spikes import spike_rates

__all__ = ["DynamicLayers", "SnnDlftConfig", "adapt", "load", "spike_rates"]

_HOMES = {
    "DynamicLayers": "callback",
    "SnnDlftConfig": "config",
    "adapt": "model",
    "load": "model",
    "spike_rates": "spikes",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"qinit.snndlft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qinit.snndlft' has no attribute '{name}'")
