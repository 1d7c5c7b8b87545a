"""The families of PEFT beside LoRA: a row for each, with its configuration's class, what differs from PEFT's defaults,
and what it needs to know of the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qinit.recipe_files import KEY, find_recipe, is_adapter_config, parse_file


@dataclass(frozen=True)
class Family:
    """A row. `config` is the class in peft, whose defaults hold but for `defaults`. `adapts`: it changes linear layers,
    the targets. `feed_forward`: it asks which of them are the ends of feed-forward parts. `rank` and `alpha` are what
    the configuration calls these, "" where it has none. `of_base` gives further values from the base's configuration;
    `start` changes PEFT's initial values, in place; `batch` is what a training step takes beside the tokens; `needs` is
    a setting without which there is no adapter, places that PEFT wants by number, with the reason; `problem` says what
    PEFT would only find out in training; `caches`: the base may keep keys and values. `note` says what its user has to
    know."""

    config: str
    paper: str
    adapts: bool = True
    rank: str = ""
    alpha: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    feed_forward: bool = False
    of_base: Callable[[Any], dict[str, Any]] = lambda config: {}
    start: Callable[[Any], None] = lambda model: None
    batch: Callable[[int], dict[str, torch.Tensor]] = lambda size: {}
    needs: tuple[str, str] | None = None
    problem: Callable[[Mapping[str, Any]], str | None] = lambda options: None
    caches: bool = True
    note: str = ""


def _orthogonal(model: Any) -> None:
    """Make P and Q orthogonal (arXiv:2303.10512, equation 4 asks for it, and PEFT draws them at random); with the
    singular values at zero that changes nothing."""
    for module in model.modules():
        for matrix in (*getattr(module, "lora_A", {}).values(), *getattr(module, "lora_B", {}).values()):
            nn.init.orthogonal_(matrix)


def _grows(options: Mapping[str, Any]) -> str | None:
    initial, target = options["init_r"], options["target_r"]
    return f"target_r {target} is above the initial rank {initial}; give less" if target > initial else None


def _all_but_two(config: Any) -> dict[str, Any]:
    """The topmost layers but for two, as the paper adapts 30 of 32."""
    return {"adapter_layers": max(1, config.num_hidden_layers - 2)}


def _width(config: Any) -> dict[str, Any]:
    return {"hidden_size": config.hidden_size}


def _first_task(size: int) -> dict[str, torch.Tensor]:
    return {"task_ids": torch.zeros(size, dtype=torch.long)}


PROMPT: dict[str, Any] = {"adapts": False, "defaults": {"num_virtual_tokens": 20}}
ADAPTERS_NEEDED = (
    "adapters",
    "xlora mixes LoRA adapters that are there: give --recipe FILE, a JSON file with "
    '{"peft_type": "XLORA", "adapters": {"0": DIR, "1": DIR}}',
)

FAMILIES: dict[str, Family] = {
    "adalora": Family(
        "AdaLoraConfig",
        "arXiv:2303.10512",
        rank="init_r",
        alpha="lora_alpha",
        defaults={"target_r": 8, "init_r": 12, "tinit": 500, "tfinal": 1500, "deltaT": 10, "total_step": 10_000},
        start=_orthogonal,
        problem=_grows,
        note="AdaLoRA prunes by its total_step: give that of your training in a JSON file, with --recipe",
    ),
    "ia3": Family("IA3Config", "arXiv:2205.05638", feed_forward=True),
    "loha": Family("LoHaConfig", "arXiv:2108.06098", rank="r", alpha="alpha"),
    "lokr": Family("LoKrConfig", "arXiv:2309.14859", rank="r", alpha="alpha"),
    "oft": Family("OFTConfig", "arXiv:2306.07280"),
    "boft": Family("BOFTConfig", "arXiv:2311.06243"),
    "vera": Family("VeraConfig", "arXiv:2310.11454", rank="r"),
    "hra": Family("HRAConfig", "arXiv:2405.17484", rank="r"),
    "xlora": Family(
        "XLoraConfig",
        "arXiv:2402.07148",
        adapts=False,
        of_base=_width,
        needs=ADAPTERS_NEEDED,
        caches=False,
    ),
    "adaption-prompt": Family(
        "AdaptionPromptConfig",
        "arXiv:2303.16199",
        adapts=False,
        defaults={"adapter_len": 10},
        of_base=_all_but_two,
    ),
    "prompt-tuning": Family("PromptTuningConfig", "arXiv:2104.08691", **PROMPT),
    "prefix-tuning": Family("PrefixTuningConfig", "arXiv:2101.00190", **PROMPT),
    "multitask-prompt-tuning": Family("MultitaskPromptTuningConfig", "arXiv:2303.02861", batch=_first_task, **PROMPT),
}


def family_named(settings: Mapping[str, Any]) -> str | None:
    """Return the family that an adapter configuration is of, None where it is of none in the table."""
    name = str(settings.get(KEY)).lower().replace("_", "-")
    return name if name in FAMILIES else None


def settings_in(file: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the family that a file is the adapter configuration of, with its settings; None and nothing for any other
    file. Raises RecipeError for a file that cannot be read."""
    settings = parse_file(find_recipe(file))
    return (family_named(settings), settings) if is_adapter_config(settings) else (None, {})
