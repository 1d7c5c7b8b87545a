"""Skeletons of families whose layers the stock loaders treat in ways of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qinit.source.checkpoint import Checkpoint
from qinit.stock.skeleton import Skeleton
from tests.models import GATED, SMALL

LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", GATED),
    "llama_head": ("llama", "LlamaForSequenceClassification", {**GATED, "num_labels": 32}),
    "mamba": ("mamba", "MambaForCausalLM", {**SMALL, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8}),
    "siglip": ("siglip_vision_model", "SiglipVisionModel", {**LAYERS, "image_size": 16, "patch_size": 8}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", {**GATED, **MOE, "mlp_only_layers": [0]}),
    "distilbert": (
        *("distilbert", "DistilBertForSequenceClassification"),
        {**SMALL, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2},
    ),
}


@pytest.fixture(scope="session")
def skeleton(tmp_path_factory):
    """Return what makes a family's skeleton, of its configuration alone."""

    def made(family: str) -> Skeleton:
        model_type, architecture, values = KINDS[family]
        config = {"model_type": model_type, "architectures": [architecture], **values}
        directory = tmp_path_factory.mktemp(family)
        (directory / "config.json").write_text(json.dumps(config))
        return Skeleton.of(Checkpoint(directory, config, {}))

    return made
