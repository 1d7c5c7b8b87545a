"""LoRA as PEFT reads it. The only place that knows the LoRA scale s = lora_alpha / r.

PEFT computes W x + s B (A x), so the solver's L = B A is stored as A / sqrt(s), B / sqrt(s). The file is
float32, as PEFT trains it. adapter_config.json holds only keys that peft 0.18 knows.

Experts that are slices of a 3-D parameter are adapted by `target_parameters`, in the layout that peft has since 0.19.1:
A [experts * r, in], the rows of an expert one after the other, and B [out, r * experts], the experts' columns taking
turns. A module that has several such parameters is wrapped for each of them, the first innermost (`base_layer`). Where
the slices are [in, out] and the module does not say so (`is_transposed`), PEFT takes the inputs for outputs: L' = A' B'
stands there then.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qinit.adapters.base import PREFIX, Adapter, Ranks
from qinit.adapters.changes import Changes
from qinit.adapters.lora_changes import SavedLora, UnmergeableError
from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor, TensorSpec, slice_name
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
    experts = True

    def recognises(self, config: dict[str, Any]) -> bool:
        return super().recognises(config) and not config.get("use_dora")

    def specs(self, module: LinearModule, rank: int) -> list[TensorSpec]:
        name_a, name_b = _names(self.stack_of(module))
        expert = module.expert
        if expert is not None:
            name_a, name_b = slice_name(name_a, expert.index), slice_name(name_b, expert.index)
        inputs, outputs = _sides(module)
        return [
            TensorSpec(name_a, torch.float32, (rank, inputs)),
            TensorSpec(name_b, torch.float32, (outputs, rank)),
        ]

    def file_specs(self, modules: Ranks) -> list[TensorSpec]:
        found: dict[str, TensorSpec] = {}
        for module, rank in modules:
            for spec, side in zip(self.specs(module, rank) if rank else (), (0, 1), strict=False):
                if module.expert is None:
                    found[spec.name] = spec
                    continue
                shape = list(spec.shape)
                shape[side] *= module.expert.count
                name = spec.name.rpartition("[")[0]
                found[name] = TensorSpec(name, spec.dtype, tuple(shape))
        return list(found.values())

    def split(self, modules: Ranks, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        found = dict(tensors)
        for module, rank in modules:
            if module.expert is None or module.expert.index or not rank:
                continue
            name_a, name_b = _names(self.stack_of(module))
            if name_a in found:
                found |= {part.name: part for part in found.pop(name_a).blocks(module.expert.count)}
            if name_b in found:
                found |= {part.name: part for part in found.pop(name_b).strands(module.expert.count)}
        return found

    def stack_of(self, module: LinearModule) -> str:
        if module.expert is None:
            return module.name
        return module.parameter.rpartition(".")[0] + ".base_layer" * module.expert.behind

    def encode(
        self,
        module: LinearModule,
        low_rank: LowRank | None,
        rank: int,
        scale: float,
        seed: int,
        base: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """As `Adapter.encode`; PEFT's own start is A Kaiming-uniform and B zero."""
        name_a, name_b = self.names(module)[:2]
        if low_rank is None:
            bound = 1 / math.sqrt(module.in_features)  # kaiming_uniform_(a=sqrt(5)), as PEFT's reset_lora_parameters
            generator = torch.Generator().manual_seed(seed)
            A = (torch.rand(rank, module.in_features, generator=generator) * 2 - 1) * bound
            return {name_a: A, name_b: torch.zeros(module.out_features, rank)}
        root = math.sqrt(scale)
        A, B = (low_rank.B.T, low_rank.A.T) if _swapped(module) else (low_rank.A, low_rank.B)
        return {name_a: A.cpu() / root, name_b: B.cpu() / root}

    def decode(self, module: LinearModule, tensors: Mapping[str, torch.Tensor], scale: float) -> LowRank:
        name_a, name_b = self.names(module)[:2]
        root = math.sqrt(scale)
        A, B = tensors[name_a] * root, tensors[name_b] * root
        return LowRank(A.T, B.T) if _swapped(module) else LowRank(B, A)

    def config(self, recipe: Recipe, architecture: Architecture, ranks: Ranks, base: str) -> dict[str, Any]:
        """As `Adapter.config`. A module whose rank differs from the recipe's gets a rank_pattern entry and an
        alpha_pattern entry that keeps its scale the same."""
        adapted = [(module, rank) for module, rank in ranks if rank]
        modules = [module for module, _ in adapted if module.expert is None]
        experts = list(dict.fromkeys(module.parameter for module, _ in adapted if module.expert is not None))
        deviating = {
            module.name if module.expert is None else module.parameter: rank
            for module, rank in adapted
            if rank != recipe.rank
        }
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
            "target_modules": _target_modules([module.name for module in modules], architecture),
            **({"target_parameters": _target_parameters(experts, architecture)} if experts else {}),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(module.transposed for module in modules),
            "init_lora_weights": True,
            "inference_mode": False,  # PeftModel.from_pretrained overrules it; get_peft_model believes it
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

    def change_of_stack(
        self, expert: LinearModule, parts: Mapping[str, torch.Tensor], config: dict[str, Any]
    ) -> torch.Tensor:
        assert expert.expert is not None
        count = expert.expert.count
        A = parts["A"].float().unflatten(0, (count, -1))
        B = parts["B"].float().unflatten(1, (-1, count)).permute(2, 0, 1)
        change = (B @ A).mul_(self.scale(expert.parameter, A.shape[1], config))
        return change.mT if expert.expert.told else change

    def changes(
        self, directory: Path, config: dict[str, Any], tensors: Mapping[str, StoredTensor], architecture: Architecture
    ) -> Changes:
        try:
            return SavedLora(config, tensors, architecture, self.scale).changes()
        except UnmergeableError as error:
            raise CheckpointError(f"{directory}: cannot be merged: {error}") from None

    def scale(self, module: str, rank: int, config: dict[str, Any]) -> float:
        """Return what PEFT multiplies B A of a module with."""
        patterns = config.get("alpha_pattern") or {}
        alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = config["lora_alpha"] if alpha is None else alpha
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    def is_neutral(self, module: LinearModule, tensors: Mapping[str, torch.Tensor]) -> bool:
        return not bool(tensors[self.names(module)[1]].any())


def _task_type(architecture: Architecture) -> str | None:
    """Return what PEFT calls the model's task; a decoder beside what sees or hears is no encoder-decoder. PEFT's models
    of a task hand `input_ids` on, so one that reads sound or pictures has none: it is called as it is."""
    if architecture.main_input != "input_ids":
        return None
    if architecture.language:
        return TASK_TYPES["ForCausalLM"]
    return next((task for end, task in TASK_TYPES.items() if architecture.class_name.endswith(end)), None)


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _names(module: str) -> tuple[str, str]:
    """Return the names of A and B of a module as PEFT has it."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _swapped(module: LinearModule) -> bool:
    """Whether PEFT takes an expert's inputs for outputs."""
    return module.expert is not None and module.expert.told != module.transposed


def _sides(module: LinearModule) -> tuple[int, int]:
    """Return the inputs and outputs that PEFT takes a module to have."""
    sides = module.in_features, module.out_features
    return sides[::-1] if _swapped(module) else sides


def _target_parameters(adapted: list[str], architecture: Architecture) -> list[str]:
    """The last two components of their names where these select just the adapted ones, whole names otherwise."""
    others = {".".join(s.name.split(".")[-2:]) for s in architecture.stacks if s.name not in adapted}
    return sorted({name if (end := ".".join(name.split(".")[-2:])) in others else end for name in adapted})


def _target_modules(adapted: list[str], architecture: Architecture) -> list[str] | str:
    """Last name components where these select just the adapted modules, whole names otherwise; an expression where one
    of these is the end of another module's too. PEFT looks at the names of all modules, whatever these are."""
    chosen = set(adapted)
    names = dict.fromkeys((*architecture.classes, *(module.name for module in architecture.linear)))
    others = {ending for name in names if name not in chosen for ending in _endings(name)}
    targets = sorted({name if (last := name.rsplit(".", 1)[-1]) in others else last for name in adapted})
    return targets if others.isdisjoint(targets) else "|".join(map(re.escape, sorted(adapted)))


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
