"""Spiking AdaLoRA as a method of PEFT: a configuration, a tuner, and their registration.

Its adapters have a type of their own, so that a PEFT that knows nothing of spikes refuses them instead of computing
something else. Everything that does not spike is PEFT's AdaLoRA itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import AdaLoraConfig, mapping
from peft.tuners.adalora import AdaLoraModel, SVDQuantLinear

from qinit.errors import QinitError
from qinit.recipe_files import NOT_LINEAR, SPIKING
from qinit.snndlft.spikes import add_spikes


@dataclass
class SpikingAdaLoraConfig(AdaLoraConfig):
    """AdaLoRA's configuration and that of the neurons, see SnnDlftConfig."""

    time_steps: int = 4
    decay: float = 0.9
    threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPIKING


class SpikingAdaLoraModel(AdaLoraModel):
    """PEFT's AdaLoraModel, each of whose layers spikes."""

    @staticmethod
    def _create_new_module(
        lora_config: Any, adapter_name: str, target: Any, device_map: Any = None, **options: Any
    ) -> Any:
        if hasattr(target, "qweight"):  # PEFT takes packed layers of the one kernel alone that it would choose itself
            layer = SVDQuantLinear(target, adapter_name, config=lora_config, **options)
        else:
            layer = AdaLoraModel._create_new_module(lora_config, adapter_name, target, device_map, **options)
        return add_spikes(layer, lora_config.time_steps, lora_config.decay, lora_config.threshold)

    def _check_merge_allowed(self) -> None:
        raise QinitError(NOT_LINEAR)


def register() -> None:
    """Tell PEFT of the method, as `register_peft_method` does for a type that its own list has."""
    name: Any = SPIKING
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = SpikingAdaLoraConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = SpikingAdaLoraModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = AdaLoraModel.prefix
