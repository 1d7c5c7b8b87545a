"""The LoRA adapter as PEFT reads it. The only place that knows the LoRA scale s = lora_alpha / r.

PEFT computes W x + s B (A x), so the solver's L = B A is stored as A / sqrt(s), B / sqrt(s). The file is
float32, as PEFT trains it. adapter_config.json holds only keys that peft 0.18 knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qinit.files.tensors import TensorSpec
from qinit.linalg.low_rank import LowRank
from qinit.recipe import Recipe
from qinit.source.targets import Architecture, LinearModule

ADAPTER_DIRECTORY = "eqft_init"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_STEM = "adapter_model"
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def tensor_names(module: LinearModule) -> tuple[str, str]:
    """Return the names of A [r, in] and B [out, r] in adapter_model.safetensors."""
    return f"base_model.model.{module.name}.lora_A.weight", f"base_model.model.{module.name}.lora_B.weight"


def specs(module: LinearModule, rank: int) -> list[TensorSpec]:
    """Return what is stored for one module."""
    name_a, name_b = tensor_names(module)
    return [
        TensorSpec(name_a, torch.float32, (rank, module.in_features)),
        TensorSpec(name_b, torch.float32, (module.out_features, rank)),
    ]


def encode(
    module: LinearModule, low_rank: LowRank | None, rank: int, scale: float, seed: int
) -> dict[str, torch.Tensor]:
    """Return the stored A and B; without a low-rank part, PEFT's own start: A Kaiming-uniform, B zero."""
    name_a, name_b = tensor_names(module)
    if low_rank is None:
        bound = 1 / math.sqrt(module.in_features)  # kaiming_uniform_(a=sqrt(5)), as PEFT's reset_lora_parameters
        generator = torch.Generator().manual_seed(seed)
        A = (torch.rand(rank, module.in_features, generator=generator) * 2 - 1) * bound
        return {name_a: A, name_b: torch.zeros(module.out_features, rank)}
    root = math.sqrt(scale)
    return {name_a: low_rank.A.cpu() / root, name_b: low_rank.B.cpu() / root}


def decode(module: LinearModule, tensors: Mapping[str, torch.Tensor], scale: float) -> LowRank:
    """Return L = B A from the stored A and B, with the scale in it: what undoes `encode`, but for rounding."""
    name_a, name_b = tensor_names(module)
    root = math.sqrt(scale)
    return LowRank(tensors[name_b] * root, tensors[name_a] * root)


def adapter_config(
    recipe: Recipe, architecture: Architecture, ranks: Sequence[tuple[LinearModule, int]], base: str
) -> dict[str, Any]:
    """Return adapter_config.json for these modules and ranks.

    A module whose rank differs from the recipe's gets a rank_pattern entry and an alpha_pattern entry that
    keeps its scale the same.
    """
    deviating = {module.name: rank for module, rank in ranks if rank != recipe.rank}
    root = math.sqrt if recipe.use_rslora else float
    return {
        "peft_type": "LORA",
        "task_type": next((t for end, t in TASK_TYPES.items() if architecture.class_name.endswith(end)), None),
        "base_model_name_or_path": base,
        "revision": None,
        "r": recipe.rank,
        "lora_alpha": _plain(recipe.alpha),
        "use_rslora": recipe.use_rslora,
        "rank_pattern": deviating,
        "alpha_pattern": {name: _plain(recipe.lora_scale * root(rank)) for name, rank in deviating.items()},
        "target_modules": _target_modules([module.name for module, _ in ranks], architecture),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(module.transposed for module, _ in ranks),
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _target_modules(adapted: list[str], architecture: Architecture) -> list[str]:
    """Last name components where these select just the adapted modules, whole names otherwise."""
    chosen = set(adapted)
    others = {module.name.rsplit(".", 1)[-1] for module in architecture.linear if module.name not in chosen}
    return sorted({name if (last := name.rsplit(".", 1)[-1]) in others else last for name in adapted})
