import sys

import pytest

from qinit.adapters import ADAPTERS
from qinit.recipe import make_recipe
from qinit.source.targets import architecture_of
from qinit.stock.adapting import Refused, adapt

LORA = ADAPTERS["lora"]
RECIPE = make_recipe(rank=4)
PREFIX = "base_model.model."


def planned(skeleton, *endings):
    """What a plan has for the modules of a skeleton with these endings: their configuration and tensors."""
    architecture = architecture_of(skeleton.build(), skeleton.checkpoint)
    ranks = [(module, 4) for module in architecture.linear if module.name.endswith(endings)]
    shapes = {spec.name: spec.shape for module, rank in ranks for spec in LORA.specs(module, rank)}
    return LORA.config(RECIPE, architecture, ranks, ""), shapes


def test_plain_layers_get_what_the_plan_has(skeleton):
    config, shapes = planned(skeleton("llama"), "_proj")
    found = adapt(skeleton("llama"), config, shapes)
    assert found.tensors == shapes
    assert len(shapes) == 28
    assert (found.whole, found.lost, found.on_parameters) == ({}, frozenset(), False)


def test_a_tensor_that_arrives_nowhere_is_named(skeleton):
    config, shapes = planned(skeleton("llama"), "q_proj")
    stray = f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"
    assert adapt(skeleton("llama"), config, {**shapes, stray: (4, 64)}).lost == {stray}


def test_a_short_name_that_hits_more_is_seen(skeleton):
    config, shapes = planned(skeleton("llama"), "q_proj")
    found = adapt(skeleton("llama"), {**config, "target_modules": ["q_proj", "embed_tokens"]}, shapes)
    assert {name.removeprefix(PREFIX) for name in found.tensors.keys() - shapes.keys()} == {
        "model.embed_tokens.lora_embedding_A",
        "model.embed_tokens.lora_embedding_B",
    }


def test_a_head_that_is_trained_whole_is_told_by_its_own_names(skeleton):
    config, shapes = planned(skeleton("llama_head"), "_proj")
    found = adapt(skeleton("llama_head"), config, shapes)
    assert found.whole == {f"{PREFIX}score.weight": "score.weight"}
    assert found.tensors == {**shapes, f"{PREFIX}score.weight": (32, 64)}


def test_what_is_moved_to_experts_is_seen(skeleton):
    config, shapes = planned(skeleton("qwen3_moe"), "o_proj", "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")
    found = adapt(skeleton("qwen3_moe"), config, shapes)
    assert found.on_parameters
    assert {name for name in shapes if "mlp" in name} == shapes.keys() - found.tensors.keys()


def test_what_it_refuses_is_said_in_its_own_words_without_what_has_no_order(skeleton):
    config, shapes = planned(skeleton("mamba"), "out_proj")
    with pytest.raises(
        Refused, match=r"Module 'out_proj' is incompatible with Mamba-based models \(model_type='mamba'\)$"
    ):
        adapt(skeleton("mamba"), config, shapes)


def test_nothing_is_imported_that_packs_layers(skeleton):
    before = set(sys.modules)
    config, shapes = planned(skeleton("llama"), "k_proj")
    adapt(skeleton("llama"), config, shapes)
    assert not {"gptqmodel", "bitsandbytes"} & (set(sys.modules) - before)
