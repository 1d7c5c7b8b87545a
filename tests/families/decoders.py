"""Models that predict the next token."""

from __future__ import annotations

from tests.families.family import GATED, LAYERS, SMALL, Family

GPT = {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32},
    **{"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
STATE = {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}

DECODERS = (
    Family("Llama 2", "Llama", {**GATED, "num_key_value_heads": 4}),
    Family(
        "Llama 3",
        "Llama",
        {
            **GATED,
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            },
        },
    ),
    Family(
        "Llama 4",
        "Llama4",
        {**GATED, "num_local_experts": 4, "intermediate_size_mlp": 128, "head_dim": 16},
        config="Llama4TextConfig",
        classes={"none": "Llama4TextModel"},
    ),
    Family("Mistral", "Mistral", {**GATED, "sliding_window": 8}),
    Family("Qwen2", "Qwen2", GATED),
    Family("Qwen2.5", "Qwen2", {**GATED, "tie_word_embeddings": True}),
    Family("Qwen3", "Qwen3", {**GATED, "head_dim": 32}),
    Family("Qwen2-MoE", "Qwen2Moe", {**GATED, **EXPERTS, "shared_expert_intermediate_size": 64}),
    Family("Qwen3-MoE", "Qwen3Moe", {**GATED, **EXPERTS, "head_dim": 16, "mlp_only_layers": [0]}),
    Family(
        "Qwen3-Next",
        "Qwen3Next",
        {
            **{**GATED, **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
            **{"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
        },
    ),
    Family("Gemma", "Gemma", {**GATED, "head_dim": 32}),
    Family("Gemma 2", "Gemma2", {**GATED, "head_dim": 32, "sliding_window": 8}),
    Family(
        "Gemma 3 (text)",
        "Gemma3",
        {**GATED, **SLIDING, "head_dim": 32},
        config="Gemma3TextConfig",
        classes={"none": "Gemma3TextModel", "sequence": "Gemma3TextForSequenceClassification"},
    ),
    Family(
        "Gemma 3n (text)",
        "Gemma3n",
        {
            **{**GATED, **SLIDING, "head_dim": 32, "vocab_size_per_layer_input": 256, "laurel_rank": 32},
            **{"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 0, "altup_num_inputs": 2},
            **{"activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [128, 128]},
        },
        config="Gemma3nTextConfig",
        classes={"none": "Gemma3nTextModel"},
    ),
    Family("Phi", "Phi", {**GATED, "num_key_value_heads": 4}),
    Family("Phi-3", "Phi3", GATED),
    Family("Phi-MoE", "Phimoe", {**GATED, "num_local_experts": 4}),
    Family("Falcon", "Falcon", {**SMALL, **LAYERS, "new_decoder_architecture": False, "multi_query": True}),
    Family(
        "Falcon-H1",
        "FalconH1",
        {
            **{**GATED, "head_dim": 16, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
            **{"mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16},
        },
    ),
    Family("GPT-2", "GPT2", GPT),
    Family("GPT-J", "GPTJ", {**GPT, "rotary_dim": 8}),
    Family(
        "GPT-Neo",
        "GPTNeo",
        {
            **{**SMALL, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128},
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    Family("GPT-NeoX", "GPTNeoX", {**SMALL, **LAYERS}),
    Family("GPT-BigCode", "GPTBigCode", GPT),
    Family(
        "OPT",
        "OPT",
        {
            **{**SMALL, "hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 128, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "max_position_embeddings": 128, "do_layer_norm_before": False},
        },
    ),
    Family("Bloom", "Bloom", {**SMALL, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    Family("MPT", "Mpt", {**SMALL, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    Family("StableLM", "StableLm", GATED),
    Family("OLMo", "Olmo", GATED),
    Family("OLMo 2", "Olmo2", GATED),
    Family("Cohere", "Cohere", GATED),
    Family("Cohere 2", "Cohere2", {**GATED, "sliding_window": 8, "head_dim": 16}),
    Family(
        "Granite",
        "Granite",
        {**GATED, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    ),
    Family("GLM-4", "Glm4", {**GATED, "head_dim": 16}),
    Family("SmolLM3", "SmolLM3", GATED),
    Family("DeepSeek-V2", "DeepseekV2", {**GATED, **LATENT}),
    Family("DeepSeek-V3", "DeepseekV3", {**GATED, **LATENT}),
    Family("Mixtral", "Mixtral", {**GATED, "num_local_experts": 4}),
    Family("GPT-OSS", "GptOss", {**GATED, "num_local_experts": 4, "head_dim": 16, "sliding_window": 16}),
    Family("Mamba", "Mamba", STATE),
    Family("Mamba 2", "Mamba2", {**STATE, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    Family(
        "Jamba",
        "Jamba",
        {
            **{**GATED, "num_experts": 2, "mamba_d_state": 16, "num_hidden_layers": 4},
            **{"attn_layer_offset": 1, "attn_layer_period": 2},
        },
    ),
)
