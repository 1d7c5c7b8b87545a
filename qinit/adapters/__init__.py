"""Adapters: how what repairs a layer is stored so that PEFT trains it, and what it adds to the layer's weight.

To add one: one file with a subclass of Adapter, and one line in ADAPTERS; a method's row names it.
"""

from __future__ import annotations

from typing import Any

from qinit.adapters.base import ADAPTER_DIRECTORY, CONFIG_NAME, WEIGHTS_STEM, Adapter, write_config
from qinit.adapters.dora import DoraAdapter
from qinit.adapters.lora import LoraAdapter

ADAPTERS: dict[str, Adapter] = {adapter.name: adapter for adapter in (LoraAdapter(), DoraAdapter())}


def adapter_of(config: dict[str, Any]) -> Adapter | None:
    """Return the kind of a saved adapter by its adapter_config.json, None for one that qinit does not know."""
    return next((adapter for adapter in ADAPTERS.values() if adapter.recognises(config)), None)


__all__ = [
    "ADAPTERS",
    "ADAPTER_DIRECTORY",
    "CONFIG_NAME",
    "WEIGHTS_STEM",
    "Adapter",
    "DoraAdapter",
    "LoraAdapter",
    "adapter_of",
    "write_config",
]
