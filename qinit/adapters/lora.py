"""LoRA as PEFT reads it. The only place that knows the LoRA scale s = lora_alpha / r.

PEFT computes W x + s B (A x), so the solver's L = B A is stored as A / sqrt(s), B / sqrt(s). The file is
float32, as PEFT trains it. adapter_config.json holds only keys that peft 0.18 knows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qinit.adapters.base import PREFIX, Adapter
from qinit.files.tensors import TensorSpec
from qinit.linalg.low_rank import LowRank
from qinit.recipe import Recipe
from qinit.source.targets import Architecture, LinearModule

MORE_THAN_FACTORS = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")  # of adapter_config.json
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class LoraAdapter(Adapter):
    name = "lora"
    peft_type = "LORA"

    def specs(self, module: LinearModule, rank: int) -> list[TensorSpec]:
        return [
            TensorSpec(f"{PREFIX}{module.name}.lora_A.weight", torch.float32, (rank, module.in_features)),
            TensorSpec(f"{PREFIX}{module.name}.lora_B.weight", torch.float32, (module.out_features, rank)),
        ]

    def encode(
        self, module: LinearModule, low_rank: LowRank | None, rank: int, scale: float, seed: int
    ) -> dict[str, torch.Tensor]:
        """As `Adapter.encode`; PEFT's own start is A Kaiming-uniform and B zero."""
        name_a, name_b = self.names(module)
        if low_rank is None:
            bound = 1 / math.sqrt(module.in_features)  # kaiming_uniform_(a=sqrt(5)), as PEFT's reset_lora_parameters
            generator = torch.Generator().manual_seed(seed)
            A = (torch.rand(rank, module.in_features, generator=generator) * 2 - 1) * bound
            return {name_a: A, name_b: torch.zeros(module.out_features, rank)}
        root = math.sqrt(scale)
        return {name_a: low_rank.A.cpu() / root, name_b: low_rank.B.cpu() / root}

    def decode(self, module: LinearModule, tensors: Mapping[str, torch.Tensor], scale: float) -> LowRank:
        name_a, name_b = self.names(module)
        root = math.sqrt(scale)
        return LowRank(tensors[name_b] * root, tensors[name_a] * root)

    def config(
        self, recipe: Recipe, architecture: Architecture, ranks: Sequence[tuple[LinearModule, int]], base: str
    ) -> dict[str, Any]:
        """As `Adapter.config`. A module whose rank differs from the recipe's gets a rank_pattern entry and an
        alpha_pattern entry that keeps its scale the same."""
        deviating = {module.name: rank for module, rank in ranks if rank != recipe.rank}
        root = math.sqrt if recipe.use_rslora else float
        return {
            "peft_type": self.peft_type,
            "task_type": _task_type(architecture),
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

    def part_of(self, tensor: str) -> tuple[str, str] | None:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", tensor)
        return (match[1], match[2]) if match else None

    def beyond(self, config: dict[str, Any], parts: Mapping[str, Mapping[str, object]]) -> str | None:
        more = [key for key in MORE_THAN_FACTORS if config.get(key)]
        more += [f"{module} with one of its factors" for module, pair in parts.items() if len(pair) < 2]
        return next(iter(more), None)

    def change(self, module: str, parts: Mapping[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
        """Return s B A [out, in] in float32."""
        A, B = parts["A"].float(), parts["B"].float()
        return (B @ A).mul_(self.scale(module, len(A), config))

    def scale(self, module: str, rank: int, config: dict[str, Any]) -> float:
        """Return what PEFT multiplies B A of a module with."""
        patterns = config.get("alpha_pattern") or {}
        alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = config["lora_alpha"] if alpha is None else alpha
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    def is_neutral(self, module: LinearModule, tensors: Mapping[str, torch.Tensor]) -> bool:
        return not bool(tensors[self.names(module)[1]].any())


def _task_type(architecture: Architecture) -> str | None:
    """Return what PEFT calls the model's task; a decoder beside what sees or hears is no encoder-decoder."""
    if architecture.language:
        return TASK_TYPES["ForCausalLM"]
    return next((task for end, task in TASK_TYPES.items() if architecture.class_name.endswith(end)), None)


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _target_modules(adapted: list[str], architecture: Architecture) -> list[str]:
    """Last name components where these select just the adapted modules, whole names otherwise."""
    chosen = set(adapted)
    others = {module.name.rsplit(".", 1)[-1] for module in architecture.linear if module.name not in chosen}
    return sorted({name if (last := name.rsplit(".", 1)[-1]) in others else last for name in adapted})
