"""A saved LoRA adapter, whoever trained it, as changes of parameters: what PEFT's `merge_and_unload` makes of them.

PEFT saves, below `base_model.model.`:

    X.lora_A.weight, X.lora_B.weight            W + s B A; experts, in the layout of `qinit.adapters.lora`
    X.lora_B.bias                               b + s times it (lora_bias)
    X.lora_magnitude_vector                     DoRA
    X.lora_embedding_A, X.lora_embedding_B      E + s (B A)^T
    X.token_adapter.trainable_tokens_delta      rows of an embedding (trainable_token_indices)
    X.PARAMETER, X.base_layer.PARAMETER         as it stands (modules_to_save, bias, save_embedding_layers)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qinit.adapters.base import PREFIX
from qinit.adapters.changes import BiasAdded, Changes, LowRankAdded, Replaced, Rows
from qinit.files.tensors import StoredTensor
from qinit.source.targets import Architecture

# Options of PEFT that a merge knows, or that are about the training alone; any other that is set is refused.
KNOWN = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
        "peft_version",
    ),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "lora_bias"),
    *("use_dora", "lora_dropout", "modules_to_save", "trainable_token_indices", "target_modules", "exclude_modules"),
    *("target_parameters", "layers_to_transform", "layers_pattern", "init_lora_weights", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size"),
    "megatron_core",
}
# Starts with which PEFT changes the base too, again each time that the adapter is loaded.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
PARTS = {
    r"(.+)\.lora_A\.weight": "A",
    r"(.+)\.lora_B\.weight": "B",
    r"(.+)\.lora_B\.bias": "bias",
    r"(.+)\.lora_magnitude_vector(?:\.weight)?": "magnitude",
    r"(.+)\.lora_embedding_A": "A",
    r"(.+)\.lora_embedding_B": "B",
    r"(.+)\.token_adapter\.trainable_tokens_delta": "rows",
}

Scale = Callable[[str, int, dict[str, Any]], float]  # of a module and its rank


class UnmergeableError(Exception):
    """What of an adapter a merge does not take, in words."""


@dataclass(frozen=True)
class SavedLora:
    """The configuration and the tensors that PEFT has saved, for a model; `scale` is what B A is multiplied with."""

    settings: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    architecture: Architecture
    scale: Scale

    def changes(self) -> Changes:
        """Return what becomes of each parameter. Raises UnmergeableError."""
        self._require_known()
        found: Changes = {}
        for parameter, tensor in self._whole().items():  # first: what is saved with an adapter on it lies below it
            found.setdefault(parameter, []).append(Replaced(tensor))
        for name, change in (*self._of_modules(), *self._of_experts()):
            found.setdefault(name, []).append(change)
        return found

    def _require_known(self) -> None:
        from peft import LoraConfig

        known_to_peft = set(LoraConfig.__dataclass_fields__)  # it passes over all others
        for key, value in self.settings.items():
            if value and key in known_to_peft and key not in KNOWN:
                raise UnmergeableError(f"{key} is more than what a merge adds to weights")
        start = str(self.settings.get("init_lora_weights")).lower()
        if start.startswith(CHANGES_BASE):
            raise UnmergeableError(
                f"init_lora_weights is '{start}', with which PEFT changes the base whenever it loads the adapter; save "
                "it as ordinary LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
            )

    @cached_property
    def _parts(self) -> dict[str, dict[str, StoredTensor]]:
        """The parts of each module's adapter."""
        found: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.tensors.items():
            for pattern, part in PARTS.items():
                if match := re.fullmatch(pattern, name.removeprefix(PREFIX)):
                    found.setdefault(match[1], {})[part] = tensor
        return found

    def _whole(self) -> dict[str, StoredTensor]:
        """Return what stands in the place of parameters, by their names."""
        parts = {tensor.name for found in self._parts.values() for tensor in found.values()}
        others = {name: tensor for name, tensor in self.tensors.items() if name not in parts}
        return {self._parameter(name.removeprefix(PREFIX).replace(".base_layer", "")): t for name, t in others.items()}

    def _parameter(self, name: str) -> str:
        assert self.architecture.naming is not None
        if name not in self.architecture.naming.parameters:
            raise UnmergeableError(f"'{name}' is no parameter of the model")
        return name

    def _of_modules(self) -> Iterator[tuple[str, Any]]:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        for module, parts in self._parts.items():
            if module in self._stacked:
                continue
            if (kind := self.architecture.classes.get(module)) is None:
                raise UnmergeableError(f"{module} is no module of the base; give the run that it was trained on")
            if "rows" in parts:
                yield self._parameter(f"{module}.weight"), Rows(self._rows(module), parts["rows"])
                continue
            pair = self._pair(module, parts)
            if not issubclass(kind, (nn.Linear, nn.Embedding, Conv1D)) or len(pair[0].shape) != 2:
                raise UnmergeableError(
                    f"{module} is {kind.__name__}; a merge takes linear layers, embeddings and stacked experts"
                )
            scale = self.scale(self._key(module), pair[0].shape[0], self.settings)
            turned = issubclass(kind, (nn.Embedding, Conv1D))
            weight = self._parameter(f"{module}.weight")
            yield weight, LowRankAdded(*pair, scale, parts.get("magnitude"), transposed=turned)
            if "bias" in parts:
                yield self._parameter(f"{module}.bias"), BiasAdded(parts["bias"], scale)

    def _pair(self, module: str, parts: Mapping[str, StoredTensor]) -> tuple[StoredTensor, StoredTensor]:
        if not parts.keys() >= {"A", "B"}:
            raise UnmergeableError(f"{module} has one of its two factors")
        if self.settings.get("use_dora") and "magnitude" not in parts:
            raise UnmergeableError(f"{module} has no lora_magnitude_vector, though use_dora is set")
        return parts["A"], parts["B"]

    def _key(self, module: str) -> str:
        """Return what PEFT holds against the patterns of ranks and scales: the parameter's name where that is the
        target."""
        parameter = f"{module}.weight"
        return parameter if self._is_target(parameter) else module

    def _is_target(self, parameter: str) -> bool:
        targets = self.settings.get("target_parameters") or ()
        return any(f".{parameter}".endswith(f".{target}") for target in targets)

    def _rows(self, module: str) -> list[int]:
        """Return the rows of an embedding that were trained."""
        named = self.settings.get("trainable_token_indices")
        if isinstance(named, dict):
            named = next((rows for name, rows in named.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(named, list) or not all(type(row) is int and row >= 0 for row in named):
            raise UnmergeableError(f"trainable_token_indices does not say which rows of {module} were trained")
        return named

    @cached_property
    def _stacked(self) -> dict[str, str]:
        """What the adapters of experts are saved under, each with the name of the 3-D parameter: the first of a
        module's is the innermost."""
        found = {}
        targets = [stack for stack in self.architecture.stacks if self._is_target(stack.name)]
        for number, stack in enumerate(targets):
            behind = sum(other.module == stack.module for other in targets[number + 1 :])
            found[stack.module + ".base_layer" * behind] = stack.name
        return found

    def _of_experts(self) -> Iterator[tuple[str, LowRankAdded]]:
        stacks = {stack.name: stack for stack in self.architecture.stacks}
        for saved, name in self._stacked.items():
            if saved not in self._parts:
                continue
            stack, (A, B) = stacks[name], self._pair(saved, self._parts[saved])
            if stack.unknown:
                raise UnmergeableError(f"{name}: {stack.unknown}")
            scale = self.scale(name, A.shape[0] // stack.count, self.settings)
            factors = zip(A.blocks(stack.count), B.strands(stack.count), strict=True)
            for expert, (a, b) in zip(stack.slice_names(), factors, strict=True):
                yield expert, LowRankAdded(a, b, scale, transposed=stack.told)
