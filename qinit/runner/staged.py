"""Layers of a block that are held back until the stages of the method have had their say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from qinit.calibration.walk import OpenBlock
from qinit.formats import FORMATS
from qinit.linalg.low_rank import LowRank
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.report.report import LayerRow
from qinit.solver.residual import residual_norm
from qinit.stages import STAGES, Repaired


class Held:
    """Solved layers that are not written yet: a run that is broken off solves the whole block anew."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.layers: dict[str, Repaired] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.rows: dict[str, LayerRow] = {}

    def add(
        self, layer: LayerPlan, weight: torch.Tensor, tensors: dict[str, torch.Tensor], row: LayerRow
    ) -> torch.Tensor:
        """Keep a layer, its weight W [out, in] and what it was solved to; return Q + L as its trainer would have it."""
        recipe, name = self.plan.recipe, layer.target.name
        quantized = FORMATS[recipe.format].decode(layer.target, tensors, layer.bits, layer.group_size)
        low_rank = LowRank.none(*weight.shape)
        if layer.rank:
            low_rank = self.plan.adapter.decode(layer.target.module, tensors, recipe.lora_scale)
        self.layers[name] = Repaired(layer, quantized, low_rank)
        self.weights[name], self.tensors[name], self.rows[name] = weight, tensors, row
        return quantized.addmm(low_rank.B, low_rank.A)

    def improved(self, block: OpenBlock) -> Iterator[tuple[LayerPlan, dict[str, torch.Tensor], LayerRow]]:
        """Let the method's stages work on the block and yield its layers as they are to be written; the repaired block
        has their weights."""
        for name in self.plan.recipe.row.stages:
            for changed, low_rank in STAGES[name].improved(block, self.layers).items():
                self._change(block, changed, low_rank)
        for name, repaired in self.layers.items():
            yield repaired.layer, self.tensors[name], self.rows[name]

    def _change(self, block: OpenBlock, name: str, low_rank: LowRank) -> None:
        """Take other factors for a layer. What its output was off by was measured before; they trade that between
        layers."""
        plan, repaired = self.plan, self.layers[name]
        layer, weight = repaired.layer, self.weights[name]
        encoded = plan.adapter.encode(layer.target.module, low_rank, layer.rank, plan.recipe.lora_scale, 0)
        self.tensors[name] |= encoded
        low_rank = plan.adapter.decode(layer.target.module, encoded, plan.recipe.lora_scale)
        self.layers[name] = replace(repaired, low_rank=low_rank)
        error = residual_norm(weight.cpu() - repaired.quantized, low_rank) / residual_norm(weight, None)
        self.rows[name] = replace(self.rows[name], error=error, output_error=None)
        block.repair(layer, repaired.quantized.addmm(low_rank.B, low_rank.A).to(weight.device))
