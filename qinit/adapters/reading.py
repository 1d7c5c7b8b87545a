"""An adapter on disk, whoever saved it: its tensors one module at a time, and what they add to the module's weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qinit.adapters import CONFIG_NAME, WEIGHTS_STEM, Adapter, adapter_of
from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor, read_header
from qinit.recipe_files import NOT_LINEAR, SPIKING
from qinit.source.checkpoint import read_json
from qinit.source.targets import LinearModule


def kind_of(directory: Path, settings: dict[str, Any]) -> Adapter:
    """Return the kind of the adapter in a directory. Raises CheckpointError for one that qinit does not know, and for
    one that adds no matrix."""
    kind = adapter_of(settings)
    if settings.get("peft_type") == SPIKING:
        raise CheckpointError(f"{directory}: {NOT_LINEAR}")
    if kind is None:
        raise CheckpointError(f"{directory}: an adapter of peft_type {settings.get('peft_type')!r} is not read")
    return kind


@dataclass(frozen=True)
class SavedAdapter:
    """What PEFT saved: its configuration, and each module's parts, read when they are asked for."""

    kind: Adapter
    settings: dict[str, Any]
    parts: dict[str, dict[str, StoredTensor]]

    @classmethod
    def open(cls, directory: Path, *, whole: bool = False) -> SavedAdapter:
        """Read configuration and headers. Raises CheckpointError for what is missing or damaged, and for an adapter of
        which `change` would be only a part; parameters of the model that were trained `whole` are let pass if asked."""
        settings = read_json(directory / CONFIG_NAME, "an adapter's directory has one")
        kind = kind_of(directory, settings)
        parts: dict[str, dict[str, StoredTensor]] = {}
        others = []
        for name, tensor in read_header(directory / f"{WEIGHTS_STEM}.safetensors").items():
            place = kind.part_of(name)
            if place is not None:
                parts.setdefault(place[0], {})[place[1]] = tensor
            elif not whole or "lora_" in name:
                others.append(name)
        allowed = {"modules_to_save": None} if whole else {}
        more = kind.beyond({**settings, **allowed}, parts) or next(iter(others), None)
        if more is not None:
            raise CheckpointError(f"{directory}: more than what {kind.peft_type} adds to weights ({more})")
        return cls(kind, settings, parts)

    def change(self, module: str, device: torch.device) -> torch.Tensor | None:
        """Return what is added to a module's weight [out, in], in float32, None for one that is left alone."""
        read = self._read(module, device)
        return None if read is None else self.kind.change(module, read, self.settings)

    def apply(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Return what becomes of a module's weight [out, in], float32, which is changed in place."""
        read = self._read(module, weight.device)
        return weight if read is None else self.kind.apply(module, weight, read, self.settings)

    def change_of_stack(self, expert: LinearModule, device: torch.device) -> torch.Tensor | None:
        """Return what is added to the 3-D parameter that an expert is a slice of, in its layout, as above."""
        read = self._read(self.kind.stack_of(expert), device)
        return None if read is None else self.kind.change_of_stack(expert, read, self.settings)

    def _read(self, module: str, device: torch.device) -> dict[str, torch.Tensor] | None:
        if module not in self.parts:
            return None
        return {part: tensor.read().to(device) for part, tensor in self.parts[module].items()}
