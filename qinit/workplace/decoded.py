"""Layers as their trainer will have them, from the tensors that a run writes of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from qinit.clock import counted
from qinit.formats import FORMATS
from qinit.linalg.low_rank import LowRank
from qinit.machine import CPU
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.stream.weights import ModelWeights


class Decoder:
    """Reads Q and L of a plan's layers out of their tensors, base and factors by name, as the loaders do."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def weight(self, layer: LayerPlan, tensors: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Return Q + L [out, in] in float32."""
        low_rank = self.low_rank(layer, tensors)
        return self.quantized(layer, tensors, device).addmm_(low_rank.B.to(device), low_rank.A.to(device))

    def quantized(self, layer: LayerPlan, tensors: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Return Q [out, in] in float32 on the device; of a base that is there, whatever the tensors are."""
        if (given := self.given(layer)) is not None:
            return given.to(device)
        there = {name: value.to(device) for name, value in tensors.items()}
        return FORMATS[self.plan.recipe.format].decode(layer.target, there, layer.bits, layer.group_size)

    def low_rank(self, layer: LayerPlan, tensors: Mapping[str, torch.Tensor]) -> LowRank:
        """Return L = B A, as PEFT computes it."""
        module, adapter = layer.target.module, self.plan.adapter
        if not layer.rank:
            return LowRank.none(module.out_features, module.in_features)
        own = {name: tensors[name] for name in adapter.names(module)}
        return adapter.decode(module, own, self.plan.recipe.lora_scale)

    @counted("reading")
    def given(self, layer: LayerPlan) -> torch.Tensor | None:
        """Return Q [out, in] of a layer in float32 where the base is there already, on the CPU; else None. Raises
        CheckpointError for NaN and Inf, and for tensors that do not fit the base's config.json."""
        if self._given is None:
            return None
        module = layer.target.module
        value = self._given.read(module.parameter, CPU)
        assert value is not None
        return value.T.contiguous() if module.transposed else value

    @cached_property
    def _given(self) -> ModelWeights | None:
        given, trusted = self.plan.given, self.plan.recipe.trust_remote_code
        if given is None:
            return None
        return ModelWeights(given.checkpoint, given.architecture, trust_remote_code=trusted)
