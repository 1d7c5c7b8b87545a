"""A LoRA adapter on disk, whoever wrote it: its factors one module at a time, and what PEFT makes of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qinit.adapters.lora import CONFIG_NAME, WEIGHTS_STEM
from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor, read_header
from qinit.source.checkpoint import read_json

MORE_THAN_FACTORS = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")  # of adapter_config.json


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter on disk: its tensors by module, A before B, read when they are asked for."""

    config: dict[str, Any]
    factors: dict[str, tuple[StoredTensor, StoredTensor]]

    @classmethod
    def open(cls, directory: Path) -> StoredAdapter:
        """Read the headers of what PEFT saved. Raises CheckpointError for what is missing or damaged, and for parts
        of LoRA that are more than A and B."""
        config = read_json(directory / CONFIG_NAME, "an adapter's directory has one")
        file = directory / f"{WEIGHTS_STEM}.safetensors"
        parts: dict[str, dict[str, StoredTensor]] = {}
        more = [key for key in MORE_THAN_FACTORS if config.get(key)]
        for name, tensor in read_header(file).items():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
            if match:
                parts.setdefault(match[1], {})[match[2]] = tensor
            else:
                more.append(name)
        if config.get("peft_type") != "LORA" or more or any(len(pair) < 2 for pair in parts.values()):
            what = more[0] if more else f"peft_type {config.get('peft_type')!r}"
            raise CheckpointError(f"{directory}: more than the factors A and B of LoRA ({what})")
        return cls(config, {module: (pair["A"], pair["B"]) for module, pair in parts.items()})

    def scale(self, module: str) -> float:
        """Return what PEFT multiplies B A of a module with."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        rank = self.factors[module][0].shape[0]
        alpha = self.config["lora_alpha"] if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def product(self, module: str, device: torch.device) -> torch.Tensor | None:
        """Return s B A [out, in] in float32, None for a module that the adapter leaves alone."""
        if module not in self.factors:
            return None
        A, B = (tensor.read().to(device, torch.float32) for tensor in self.factors[module])
        return (B @ A).mul_(self.scale(module))
