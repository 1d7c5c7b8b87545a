"""What is known of a template, and what is written for it: a training that starts from nothing but a base's name."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qinit.errors import RecipeError
from qinit.files.reading import printable
from qinit.recipe_files import NF4, STARTS, as_pattern, find_recipe, read_adapter_config
from qinit.source.checkpoint import ADAPTER_CONFIG
from qinit.trainers.training import Training

BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class Template:
    """An adapter configuration, by its name, and the base that it is for. `adapter`: the directory of one that is
    there already, to go on from; None: it is to be started."""

    name: str
    settings: dict[str, Any]
    base: str
    adapter: Path | None = None

    @classmethod
    def open(cls, file: Path) -> Template:
        """Read an adapter configuration, one that comes with qinit by its name, or an adapter in its directory. Raises
        RecipeError, also for one that names no base, or does not say what it adapts."""
        adapter = file.resolve() if file.is_dir() else None
        found = find_recipe(file) if adapter is None else file / ADAPTER_CONFIG
        settings = read_adapter_config(found)
        base = settings.get(BASE)
        if not isinstance(base, str) or not base or printable(base) != base:
            raise RecipeError(f"{file}: names no base to train on, under {BASE}; add it")
        return cls(printable(found.stem if adapter is None else adapter.name), settings, base, adapter)

    @property
    def is_lora(self) -> bool:
        return self.settings["peft_type"] == "LORA"

    @property
    def is_nf4(self) -> bool:
        """Whether the base is to be loaded as NF4."""
        quantization = self.settings.get("quantization_config") or {}
        return {key: quantization.get(key) for key in NF4} == NF4

    @property
    def start(self) -> str | None:
        """What PEFT calls the start, None for its usual one."""
        start = self.settings.get("init_lora_weights", True)
        return start if isinstance(start, str) else None

    @property
    def method(self) -> str:
        """What a comparison calls it."""
        if self.start is not None and (match := STARTS.fullmatch(self.start)):
            return match[1].replace("_", "-")
        if not self.is_lora:
            return str(self.settings["peft_type"]).lower().replace("_", "-")
        flags = {"use_dora": "dora", "use_rslora": "rslora"}
        other = next((name for key, name in flags.items() if self.settings.get(key)), "lora")
        return "qlora" if self.is_nf4 else other

    @property
    def bits(self) -> int:
        return 4 if self.is_nf4 else 16

    @cached_property
    def targets(self) -> list[str]:
        """The names of what is adapted, or one expression. Raises RecipeError where there are none."""
        return as_pattern(self.settings.get("target_modules"), f"{self.name}: target_modules").split(",")

    def number(self, key: str, otherwise: float) -> float:
        """Return a setting that is a number. Raises RecipeError."""
        value = self.settings.get(key, otherwise)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"{self.name}: {key}: expected a number, found {json.dumps(value)[:60]}")
        return value


class TemplateWriter(ABC):
    """Writes what a trainer needs to train from a template. Stateless. `name` is the trainer's."""

    name: str
    suffix: str
    command: str  # that takes what is written: `sh {file}`
    seen: str  # the version whose own parser took it, or the source that was read
    distribution: str

    @abstractmethod
    def cannot_write(self, template: Template, training: Training) -> str | None:
        """Return why this trainer does not start from a template, and what would work, or None."""

    @abstractmethod
    def write(self, template: Template, training: Training) -> str:
        """Return the script or the configuration."""

    def head(self, template: Template) -> dict[str, str]:
        return {
            "head": f"Fine-tunes {template.base} from {template.name}.",
            "origin": f"Written by `qinit trainer-config`; {self.seen}.",
        }

    def output(self, template: Template) -> str:
        """Return the directory, below the current one, that the trained adapter goes to."""
        return f"{template.name}-{self.name}"


def only_lora(template: Template, name: str) -> str | None:
    """Return why a trainer that makes LoRA alone, from a configuration, does not take a template, or None."""
    if template.adapter is not None:
        return f"starts an adapter, and does not go on from {template.name}; --trainer peft does"
    if template.is_lora:
        return None
    return f"makes LoRA alone, and {template.name} is {template.settings['peft_type']}; --trainer peft takes it"
