"""auto-round's own wrapping of GPTQ's first version (`auto_round:auto_gptq`): the same tensors without `g_idx`.

Widths of single layers stand in `extra_config`, by their names. As auto_round_extension/torch/qlinear_torch_zp.py has
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.formats.gptq.reading import WIDTHS, dequantized, of_first_version
from qinit.formats.reader import Reader, method_of, require_shape
from qinit.source.checkpoint import read_finite
from qinit.source.targets import LinearModule

PACKING = "auto_round:auto_gptq"


class AutoRoundReader(Reader):
    name = "auto-round"
    title = "auto-round"
    adapters = ("lora",)
    packages = ("auto_round",)
    parts = ("qweight", "qzeros", "scales")
    packed_experts_note = "auto-round takes the model's experts apart to load them, which is not done here"

    def recognises(self, config: dict[str, Any]) -> bool:
        return method_of(config) == "auto-round"

    def cannot_read(self, config: dict[str, Any]) -> str | None:
        packing = config["quantization_config"].get("packing_format")
        return None if packing == PACKING else f"auto-round as {packing}, and {PACKING} alone is read"

    def grid_of(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]
    ) -> tuple[int, int]:
        quantization = config["quantization_config"]
        own = {**quantization, **((quantization.get("extra_config") or {}).get(module.name) or {})}
        try:
            bits, group_size = int(own["bits"]), int(own["group_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{module.name}: config.json gives no bits and group size ({error})") from None
        outputs, inputs = module.out_features, module.in_features
        group_size = inputs if group_size < 1 else group_size
        if bits not in WIDTHS:
            raise CheckpointError(f"{module.name}: auto-round of {bits} bits; {', '.join(map(str, WIDTHS))} are read")
        groups = -(-inputs // group_size)
        shapes = ((inputs * bits // 32, outputs), (groups, outputs * bits // 32), (groups, outputs))
        for part, shape in zip(self.parts, shapes, strict=True):
            require_shape(parts[part], shape)
        return bits, group_size

    def read(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any], device: torch.device
    ) -> torch.Tensor:
        bits, group_size = self.grid_of(module, parts, config)
        qweight, qzeros, scales = (read_finite(parts[part]).to(device) for part in self.parts)
        groups = torch.arange(module.in_features, device=device) // group_size
        value = dequantized(qweight, of_first_version(qzeros, bits), scales, groups, bits=bits)
        return value.half().float()
