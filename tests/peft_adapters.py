"""Adapters of every kind, as PEFT makes and saves them on a base, with random values in all that would be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_base(directory: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def make_adapter(base: Path, to: Path, **settings: Any) -> Path:
    """Save an adapter for a base of stock transformers: every number that PEFT would train is another one."""
    import peft

    model = peft.get_peft_model(load_base(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 if "magnitude" in name or "modules_to_save" in name else 0.3
                parameter.add_(scale * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.1))
    model.save_pretrained(to)
    return to


def put_on(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(base), adapter)
