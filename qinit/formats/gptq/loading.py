"""What transformers needs to load GPTQ: its packages, and for layers of several widths or group sizes a quantizer of
its own."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qinit.errors import CheckpointError
from qinit.formats.gptq.reading import GRID, grid_of
from qinit.requirements import pip_command

PACKAGES = ("gptqmodel", "optimum")
MIXED_METHOD = "qinit_mixed_gptq"  # the name that transformers knows the quantizer for mixed widths by


def loader_options(base: Path, quantization: dict[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """Return what `from_pretrained` needs to be told: nothing, or for mixed widths a configuration that names the
    quantizer for them. Raises CheckpointError if a package is missing or config.json is damaged."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise CheckpointError(f"{base}: packed as GPTQ, which needs {' and '.join(missing)}; {pip_command(PACKAGES)}")
    if not _is_mixed(quantization, base):
        return {}
    import transformers  # late: it takes seconds

    _register_mixed()
    try:
        config = transformers.AutoConfig.from_pretrained(
            base, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a damaged configuration can break its class in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(f"{base / 'config.json'}: cannot be loaded ({reason})") from error
    config.quantization_config = {**quantization, "quant_method": MIXED_METHOD}
    return {"config": config}


def _is_mixed(quantization: dict[str, Any], directory: Path) -> bool:
    try:
        overrides = (quantization.get("dynamic") or {}).values()
        return any(own.get(key, quantization[key]) != quantization[key] for own in overrides for key in GRID)
    except (AttributeError, KeyError):
        raise CheckpointError(
            f"{directory / 'config.json'}: its quantization_config is not what qinit writes; run qinit again"
        ) from None


@cache
def _register_mixed() -> None:
    """Tell transformers, once and under a name of its own, of GPTQ with a width per layer."""
    from optimum.gptq import GPTQQuantizer
    from transformers import GPTQConfig
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    class MixedConfig(GPTQConfig):
        def __init__(self, dynamic: dict[str, dict[str, int]], quant_method: Any, **options: Any) -> None:
            super().__init__(**options)
            self.quant_method = quant_method  # by which transformers finds the quantizer
            self.dynamic = dynamic

    class MixedLayers(GPTQQuantizer):
        bits: int
        group_size: int
        quantization: dict[str, Any]

        def _replace_by_quant_layers(self, module: Any, names: Any, name: str = "") -> None:
            if name:  # on the way down, within one grid
                super()._replace_by_quant_layers(module, names, name)
                return
            base = self.bits, self.group_size
            grids = {target: grid_of(target, self.quantization) for target in names}
            for grid in sorted(set(grids.values())):
                self.bits, self.group_size = grid
                super()._replace_by_quant_layers(module, {target for target, own in grids.items() if own == grid})
            self.bits, self.group_size = base

    class MixedQuantizer(GptqHfQuantizer):
        def __init__(self, quantization_config: Any, **options: Any) -> None:
            super().__init__(quantization_config, **options)
            # From here on it is GPTQ to everyone, PEFT included, and is saved as such.
            quantization_config.quant_method = QuantizationMethod.GPTQ
            self.optimum_quantizer = MixedLayers.from_dict(quantization_config.to_dict_optimum())
            self.optimum_quantizer.quantization = quantization_config.to_dict()

    register_quantization_config(MIXED_METHOD)(MixedConfig)
    register_quantizer(MIXED_METHOD)(MixedQuantizer)
