"""Tiny random checkpoints that are made on the spot, with or without a tokenizer.

torch and transformers are imported on first use only: tests of the command line need them late or never.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {
    **SMALL,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# family: configuration class, model class, configuration
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GATED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GATED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GATED, "head_dim": 32}),
    "mistral": ("MistralConfig", "MistralForCausalLM", GATED),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GATED, "head_dim": 32}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GATED),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            **SMALL,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
SMALL_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# Families that are no promise of qinit's, but whose blocks are called in other ways, and mixtures of experts.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SMALL, **SMALL_LAYERS, "use_parallel_residual": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GATED, "head_dim": 32, "sliding_window": 8}),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **{**GATED, "head_dim": 32, "global_head_dim": 32, "sliding_window": 8, "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GATED, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**GATED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {**GATED, "num_local_experts": 4, "intermediate_size_mlp": 128, "head_dim": 16},
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "jetmoe": (
        "JetMoeConfig",
        "JetMoeForCausalLM",
        {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {**SMALL, **SMALL_LAYERS, "max_position_embeddings": 64}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**SMALL, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "decoder_start_token_id": 0},
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            **{**SMALL, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64},
            **{"decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
            **{"max_position_embeddings": 64, "decoder_start_token_id": 2},
        },
    ),
}
# Whose checkpoints have other names than their modules, or matrices that the loader puts together or cuts.
CONVERTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**GATED, "model_type": "llama"},
            "vision_config": {**SMALL_LAYERS, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
            "image_token_index": 255,
        },
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GATED, "num_local_experts": 4}),
    "dinov2": (
        "Dinov2Config",
        "Dinov2ForImageClassification",
        {**SMALL_LAYERS, "image_size": 16, "patch_size": 8, "use_swiglu_ffn": True, "mlp_ratio": 2},
    ),
}
# Blocks that use the keys and values of others: such a model runs as a whole.
ENTANGLED = {"num_hidden_layers": 3, "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3}
UNKNOWN = 3  # the id of a word that the word tokenizer does not know


def make_checkpoint(
    directory: Path,
    family: str = "llama",
    dtype: str = "bfloat16",
    *,
    seed: int = 0,
    model_class: str | None = None,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Save a tiny random model of a family, of OTHERS or of CONVERTED, into `directory` and return it.

    `overrides` are configuration values; `model_class` saves another class than the causal LM, e.g. GPT2Model.
    """
    import torch
    import transformers

    config_class, causal_class, values = {**FAMILIES, **OTHERS, **CONVERTED}[family]
    config = getattr(transformers, config_class)(**{**values, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class or causal_class)(config)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def make_float32(directory: Path, family: str = "llama", **overrides: Any) -> Path:
    """Save one in float32, so that what is computed with its weights can be compared to the last digits."""
    return make_checkpoint(directory, family, "float32", **overrides)


def words(*ids: int) -> str:
    """Return a text of which the word tokenizer makes these ids: word `w17` has id 17."""
    return " ".join(f"w{i}" for i in ids)


def add_tokenizer(
    directory: Path, *, bos: bool = False, encoder: bool = False, size: int = 256, **options: Any
) -> Path:
    """Save a word tokenizer into `directory`: pad 0, bos 1, eos 2; `bos` puts bos in front of every text,
    `encoder` puts bos in front and eos behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": UNKNOWN}
    vocabulary = {**special, **{f"w{i}": i for i in range(4, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos or encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if encoder else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **{"model_max_length": 10**9, **options},
    ).save_pretrained(directory)
    return directory


def make_reader(directory: Path, *, bos: bool = False, **overrides: Any) -> Path:
    """Save a tiny Llama (256 ids, 128 positions) with the word tokenizer."""
    return add_tokenizer(make_checkpoint(directory, **overrides), bos=bos)


def make_bert(directory: Path, **overrides: Any) -> Path:
    """Save a tiny encoder that takes up to 32 tokens, with its tokenizer."""
    import transformers

    config = transformers.BertConfig(
        **{
            **{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0},
            **overrides,
        }
    )
    transformers.BertForMaskedLM(config).save_pretrained(directory)
    return add_tokenizer(directory, encoder=True)


OWN_CONFIG = """\
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""
OWN_MODEL = """\
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def make_own_code(directory: Path, **overrides: Any) -> Path:
    """Save a tiny Llama whose class is code in its directory."""
    import json

    make_checkpoint(directory, **overrides)
    (directory / "configuration_own.py").write_text(OWN_CONFIG)
    (directory / "modeling_own.py").write_text(OWN_MODEL)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory
