import json
import math

import pytest
import torch

from qinit.adapters import ADAPTERS, write_config
from qinit.linalg.low_rank import LowRank
from qinit.recipe import make_recipe
from qinit.source.targets import Architecture, LinearModule

# The fields of PEFT 0.18's LoraConfig and its base classes. LLaMA-Factory 0.9.5 pins peft 0.18, which
# answers any other key in adapter_config.json with a TypeError.
PEFT_0_18_KEYS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices"),
    *("loftq_config", "eva_config", "corda_config", "use_dora", "alora_invocation_tokens", "use_qalora"),
    *("qalora_group_size", "layer_replication", "runtime_config", "lora_bias", "target_parameters"),
    *("arrow_config", "ensure_weight_tying"),
}

LORA = ADAPTERS["lora"]
UP = LinearModule("model.layers.0.mlp.up_proj", 96, 64, transposed=False)
DOWN = LinearModule("model.layers.0.mlp.down_proj", 64, 96, transposed=False)
OTHER_DOWN = LinearModule("model.layers.1.mlp.down_proj", 64, 96, transposed=False)
SMALL = LinearModule("model.layers.0.gate", 4, 64, transposed=False)
LLAMA = Architecture("LlamaForCausalLM", (UP, DOWN, OTHER_DOWN, SMALL))


def low_rank(module: LinearModule, rank: int) -> LowRank:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(module.out_features, module.in_features, generator=generator)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return LowRank(U[:, :rank] * root, root[:, None] * Vh[:rank])


def config_for(*modules: tuple[LinearModule, int], architecture=LLAMA, **options):
    return LORA.config(make_recipe(**options), architecture, modules, "base")


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 8}, 1.0),
        ({"rank": 8, "lora_alpha": 32.0}, 4.0),
        ({"rank": 8, "lora_alpha": 3.0}, 3 / 8),
        ({"rank": 8, "use_rslora": True}, math.sqrt(8)),
        ({"rank": 8, "lora_alpha": 32.0, "use_rslora": True}, 32 / math.sqrt(8)),
    ],
)
def test_scale_times_b_a_is_the_low_rank_and_both_factors_weigh_the_same(options, scale):
    recipe = make_recipe(**options)
    assert recipe.lora_scale == pytest.approx(scale)
    factors = low_rank(UP, 8)
    stored = LORA.encode(UP, factors, 8, recipe.lora_scale, seed=0)
    A, B = (stored[name] for name in LORA.names(UP))
    torch.testing.assert_close(scale * B @ A, factors.B @ factors.A, rtol=0, atol=1e-5)
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-4)


def test_what_is_stored_is_what_was_announced():
    for factors in (low_rank(UP, 8), None):
        stored = LORA.encode(UP, factors, 8, 1.0, seed=0)
        specs = LORA.specs(UP, 8)
        assert [(s.name, s.dtype, s.shape) for s in specs] == [(n, t.dtype, t.shape) for n, t in stored.items()]
        assert {spec.dtype for spec in specs} == {torch.float32}


def test_names_are_those_of_peft():
    assert tuple(LORA.names(UP)) == (
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
    )


def test_without_a_low_rank_the_adapter_starts_as_peft_s_own_does():
    name_a, name_b = LORA.names(UP)
    start = LORA.encode(UP, None, 16, 1.0, seed=5)
    assert not start[name_b].any()
    bound = 1 / math.sqrt(UP.in_features)
    assert 0.9 * bound < start[name_a].abs().max() <= bound
    assert start[name_a].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert torch.equal(start[name_a], LORA.encode(UP, None, 16, 1.0, seed=5)[name_a])
    assert not torch.equal(start[name_a], LORA.encode(UP, None, 16, 1.0, seed=6)[name_a])


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 32.0, 5.0])
def test_a_lowered_rank_keeps_the_scale(alpha, use_rslora):
    options = {"rank": 16, "lora_alpha": alpha, "use_rslora": use_rslora}
    config = config_for((UP, 16), (SMALL, 4), **options)
    assert config["rank_pattern"] == {SMALL.name: 4}
    root = math.sqrt if use_rslora else float
    scale = config["alpha_pattern"][SMALL.name] / root(4)  # as PEFT computes it
    assert scale == pytest.approx(config["lora_alpha"] / root(16))
    assert scale == pytest.approx(make_recipe(**options).lora_scale)


def test_the_config_holds_only_keys_that_peft_0_18_knows():
    for options in ({}, {"use_rslora": True, "lora_alpha": 7.5}):
        config = config_for((UP, 16), (SMALL, 4), **options)
        assert set(config) <= PEFT_0_18_KEYS
        assert config["peft_type"] == "LORA"
        assert config["task_type"] == "CAUSAL_LM"


def test_whole_alphas_are_written_as_integers():
    assert repr(config_for((UP, 16))["lora_alpha"]) == "16"
    assert repr(config_for((UP, 16), lora_alpha=7.5)["lora_alpha"]) == "7.5"


def test_short_module_names_are_used_only_where_they_match_nothing_else():
    everything = config_for(*((module, 4) for module in LLAMA.linear), rank=4)
    assert everything["target_modules"] == ["down_proj", "gate", "up_proj"]
    partly = config_for((UP, 16), (DOWN, 16))
    assert partly["target_modules"] == [DOWN.name, "up_proj"]


def test_conv1d_modules_are_announced_as_fan_in_fan_out():
    conv = LinearModule("transformer.h.0.mlp.c_fc", 64, 32, transposed=True)
    gpt2 = Architecture("GPT2LMHeadModel", (conv,))
    config = config_for((conv, 16), architecture=gpt2)
    assert config["fan_in_fan_out"] is True
    assert config["task_type"] == "CAUSAL_LM"
    assert config_for((UP, 16))["fan_in_fan_out"] is False


def test_an_unknown_kind_of_model_has_no_task_type():
    assert config_for((UP, 16), architecture=Architecture("LlamaModel", LLAMA.linear))["task_type"] is None


def test_a_decoder_that_also_sees_is_no_encoder_decoder():
    seeing = Architecture("LlavaForConditionalGeneration", LLAMA.linear, language="model.language_model")
    encoder_decoder = Architecture("T5ForConditionalGeneration", LLAMA.linear)
    found = [config_for((UP, 16), architecture=each)["task_type"] for each in (seeing, encoder_decoder)]
    assert found == ["CAUSAL_LM", "SEQ_2_SEQ_LM"]


def test_the_config_file_is_what_peft_reads_back(tmp_path):
    from peft import LoraConfig

    config = config_for((UP, 16), (SMALL, 4), lora_alpha=24.0, use_rslora=True)
    write_config(tmp_path, config)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == config
    read = LoraConfig.from_pretrained(tmp_path)
    assert (read.r, read.lora_alpha, read.use_rslora) == (16, 24, True)
    assert read.rank_pattern == {SMALL.name: 4}
    assert read.target_modules == {"gate", "up_proj"}
