"""DoRA as PEFT reads it (arXiv:2402.09353): LoRA, and beside it the length m [out] of each row of W.

PEFT computes m (Q + s B A) / |Q + s B A| row by row, so m = |Q + s B A| leaves the start as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from qinit.adapters.base import PREFIX, Adapter, Ranks
from qinit.adapters.lora import LoraAdapter
from qinit.files.tensors import TensorSpec
from qinit.linalg.chunks import row_chunks
from qinit.linalg.low_rank import LowRank
from qinit.recipe import Recipe
from qinit.source.targets import Architecture, LinearModule


class DoraAdapter(LoraAdapter):
    name = "dora"
    experts = False
    reads_base = True

    def recognises(self, config: dict[str, Any]) -> bool:
        return Adapter.recognises(self, config) and bool(config.get("use_dora"))

    def specs(self, module: LinearModule, rank: int) -> list[TensorSpec]:
        return [*super().specs(module, rank), TensorSpec(_magnitude(module), torch.float32, (module.out_features,))]

    def file_specs(self, modules: Ranks) -> list[TensorSpec]:
        return Adapter.file_specs(self, modules)

    def encode(
        self,
        module: LinearModule,
        low_rank: LowRank | None,
        rank: int,
        scale: float,
        seed: int,
        base: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        assert base is not None
        tensors = super().encode(module, low_rank, rank, scale, seed)
        stored = self.decode(module, tensors, scale).to(base.device)
        lengths = [
            torch.linalg.vector_norm(torch.addmm(base[rows], stored.B[rows], stored.A), dim=1)
            for rows in row_chunks(*base.shape, device=base.device)
        ]
        return {**tensors, _magnitude(module): torch.cat(lengths).cpu()}

    def config(self, recipe: Recipe, architecture: Architecture, ranks: Ranks, base: str) -> dict[str, Any]:
        return {**super().config(recipe, architecture, ranks, base), "use_dora": True}

    def part_of(self, tensor: str) -> tuple[str, str] | None:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_magnitude_vector(?:\.weight)?", tensor)
        return (match[1], "magnitude") if match else super().part_of(tensor)

    def beyond(self, config: dict[str, Any], parts: Mapping[str, Mapping[str, object]]) -> str | None:
        factors = {
            module: {part: found[part] for part in found if part != "magnitude"} for module, found in parts.items()
        }
        bare = (f"{module} without its magnitude" for module, found in parts.items() if "magnitude" not in found)
        return super().beyond({**config, "use_dora": False}, factors) or next(bare, None)

    def apply(
        self, module: str, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], config: dict[str, Any]
    ) -> torch.Tensor:
        """Return the rows of W + s B A, brought to their lengths m."""
        super().apply(module, weight, parts, config)
        lengths = torch.linalg.vector_norm(weight, dim=1)
        return weight.mul_((parts["magnitude"].float().flatten() / lengths)[:, None])


def _magnitude(module: LinearModule) -> str:
    return f"{PREFIX}{module.name}.lora_magnitude_vector"
