"""The parameters that a model computes with, one at a time, from what a checkpoint and an adapter hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qinit.adapters.reading import StoredAdapter
from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.formats.gptq.reading import PARTS, dequantized, width_of
from qinit.source.checkpoint import Checkpoint, count_nonfinite, require_finite
from qinit.source.targets import Architecture, LinearModule, find_tensor

OTHER_NAMES = {"lm_head.weight": ("embed_out.weight",)}  # in the files of GPT-NeoX


class StoredWeights:
    """A checkpoint's parameters by the names that the model has for them: dense, or GPTQ with a width for each layer,
    with an adapter's s B A added to the layers that it repairs.

    `linear` names the modules that the model's row of blocks is known by (all if left out).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        linear: Sequence[str] | None = None,
        adapter: StoredAdapter | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint, self.trust_remote_code = checkpoint, trust_remote_code
        self.base_prefix = architecture.base_prefix
        self.modules = {f"{module.name}.weight": module for module in architecture.linear}
        self.linear = [module.name for module in architecture.linear] if linear is None else linear
        self.adapter = adapter

    def has(self, name: str) -> bool:
        """Whether the checkpoint has that parameter, packed or not."""
        return self._find(name) is not None or self._packed(name) is not None

    def read(self, name: str, device: torch.device) -> torch.Tensor | None:
        """Return a parameter in float32 on the device, None if there is none. Raises CheckpointError for NaN, Inf."""
        stored, module = self._find(name), self.modules.get(name)
        if stored is not None:
            value = _checked(stored).to(device, torch.float32)
        elif module is not None and (parts := self._packed(name)) is not None:
            value = self._dequantized(module, parts, device)
        else:
            return None
        if module is not None and self.adapter is not None:
            added = self.adapter.product(module.name, device)
            if added is not None:
                value += added.T if module.transposed else added
        return value

    def _find(self, name: str) -> StoredTensor | None:
        others = (self.checkpoint.tensors.get(other) for other in OTHER_NAMES.get(name, ()))
        return find_tensor(self.checkpoint, name, self.base_prefix) or next(filter(None, others), None)

    def _packed(self, name: str) -> list[StoredTensor] | None:
        prefix = name.removesuffix("weight")
        parts = [self._find(prefix + part) for part in PARTS] if name.endswith(".weight") else []
        return [part for part in parts if part is not None] if parts and all(parts) else None

    def _dequantized(self, module: LinearModule, parts: list[StoredTensor], device: torch.device) -> torch.Tensor:
        bits = width_of(module.name, self.checkpoint.config["quantization_config"])
        expected = (module.in_features * bits // 32, module.out_features)
        if parts[0].shape != expected:
            raise CheckpointError(
                f"{parts[0].file}: tensor '{parts[0].name}' has shape {list(parts[0].shape)}, but config.json says "
                f"{bits} bits, so {list(expected)}; config and weights belong to different models"
            )
        weight = dequantized(*(_checked(part).to(device) for part in parts), bits=bits)
        weight = weight.half().float()  # gptqmodel's kernel computes with float16
        return weight.T.contiguous() if module.transposed else weight


def _checked(stored: StoredTensor) -> torch.Tensor:
    raw = stored.read()
    require_finite(stored, count_nonfinite(raw))
    return raw
