import json
import math
from dataclasses import replace

import pytest
import torch

from qinit.adapters import ADAPTERS, write_config
from qinit.linalg.low_rank import LowRank
from qinit.recipe import make_recipe
from qinit.source.experts import Stack
from qinit.source.targets import Architecture, Expert, LinearModule

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
    hearing = Architecture("WhisperForConditionalGeneration", LLAMA.linear, main_input="input_features")
    found = [config_for((UP, 16), architecture=each)["task_type"] for each in (seeing, encoder_decoder, hearing)]
    assert found == ["CAUSAL_LM", "SEQ_2_SEQ_LM", None]  # the last is called as it is: PEFT would pass input_ids


def test_the_config_file_is_what_peft_reads_back(tmp_path):
    from peft import LoraConfig

    config = config_for((UP, 16), (SMALL, 4), lora_alpha=24.0, use_rslora=True)
    write_config(tmp_path, config)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == config
    read = LoraConfig.from_pretrained(tmp_path)
    assert (read.r, read.lora_alpha, read.use_rslora) == (16, 24, True)
    assert read.rank_pattern == {SMALL.name: 4}
    assert read.target_modules == {"gate", "up_proj"}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], ["0", "down_proj"]),
        (["model.layers.0", "model.layers.1"], ["down_proj", "merger.mlp.0"]),  # blocks end in that number too
        (["visual.down_proj"], ["0", "model.layers.0.mlp.down_proj"]),  # of any class: PEFT asks for none
        (["x.merger.mlp.0"], r"merger\.mlp\.0|model\.layers\.0\.mlp\.down_proj"),
    ],
)
def test_short_names_are_taken_where_they_are_those_of_no_other_module(others, expected):
    merger = LinearModule("merger.mlp.0", 64, 64, transposed=False)
    names = dict.fromkeys(("merger.mlp.0", "model.layers.0.mlp.down_proj", *others), object)
    architecture = Architecture("LlavaForConditionalGeneration", (merger, DOWN), classes=names)
    found = config_for((merger, 16), (DOWN, 16), architecture=architecture)["target_modules"]
    assert found == expected


GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def expert(index: int, *, transposed=False, told=False) -> LinearModule:
    place = Expert(index, count=3, behind=1, told=told)
    return LinearModule(f"{GATE_UP}[{index}]", 96, 64, transposed=transposed, expert=place)


@pytest.mark.parametrize(("transposed", "told"), [(False, False), (True, True), (True, False)])
def test_experts_of_one_parameter_share_two_tensors_as_peft_has_them(transposed, told):
    modules = [(expert(i, transposed=transposed, told=told), 4) for i in range(3)]
    sides = (96, 64) if transposed and not told else (64, 96)  # PEFT takes the inputs for outputs
    A, B = LORA.file_specs(modules)
    assert (A.name, A.shape) == ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", (12, sides[0]))
    assert (B.name, B.shape) == ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight", (sides[1], 12))
    whole, changes = {"A": torch.zeros(A.shape), "B": torch.zeros(B.shape)}, []
    for index, (module, rank) in enumerate(modules):
        factors = low_rank(module, rank)
        stored = LORA.encode(module, factors, rank, 3.0, seed=0)
        name_a, name_b = LORA.names(module, rank)
        assert (name_a, name_b) == (f"{A.name}[{index}]", f"{B.name}[{index}]")
        whole["A"].unflatten(0, (3, -1))[index] = stored[name_a]
        whole["B"].unflatten(1, (-1, 3))[..., index] = stored[name_b]
        back = LORA.decode(module, stored, 3.0)
        torch.testing.assert_close(back.B @ back.A, factors.B @ factors.A)
        changes.append((factors.B @ factors.A).T if transposed else factors.B @ factors.A)
    found = LORA.change_of_stack(modules[0][0], whole, {"lora_alpha": 12, "r": 4})
    torch.testing.assert_close(found, torch.stack(changes), rtol=1e-4, atol=1e-5)


def test_experts_are_targets_by_their_parameters_and_without_a_rank_no_targets():
    stack = Stack(GATE_UP, 3, 96, 64, transposed=False, place=0, sources=((f"{GATE_UP}[0]",),))
    architecture = replace(LLAMA, stacks=(stack,))
    config = config_for((UP, 8), (DOWN, 0), *((expert(i), 4) for i in range(3)), architecture=architecture, rank=8)
    assert config["target_modules"] == ["up_proj"]
    assert config["target_parameters"] == ["experts.gate_up_proj"]
    assert config["rank_pattern"] == {GATE_UP: 4}
    assert set(config) <= PEFT_0_18_KEYS
    assert LORA.names(DOWN, 0) == LORA.file_specs([(DOWN, 0)]) == []
    other = replace(stack, name=GATE_UP.replace("0", "1"))
    config = config_for((UP, 8), (expert(0), 8), architecture=replace(LLAMA, stacks=(stack, other)), rank=8)
    assert config["target_parameters"] == [GATE_UP]
    assert "target_parameters" not in config_for((UP, 8), (DOWN, 8), rank=8)
