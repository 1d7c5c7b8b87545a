"""Models that are no decoder alone: encoders, encoder-decoders, and those that see or hear."""

from __future__ import annotations

from tests.families.family import ENCODER, GATED, LAYERS, SMALL, Family

MARKED = {"sep_token_id": 2, "cls_token_id": 1}
WIDE = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
BART = {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
}
PICTURE = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 32, "patch_size": 8},
}
QWEN_EYE = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64}
IMAGE_IDS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
TEXT = {**SMALL, **LAYERS}

ENCODERS = tuple(
    Family(name, stem, values, ENCODER, kind="encoder")
    for name, stem, values in (
        ("BERT", "Bert", TEXT),
        ("RoBERTa", "Roberta", {**TEXT, "type_vocab_size": 1}),
        (
            "DeBERTa-v2",
            "DebertaV2",
            {
                **{**TEXT, "position_buckets": 8, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
                **{"conv_kernel_size": 3, "conv_act": "gelu", "norm_rel_ebd": "layer_norm", "share_att_key": True},
            },
        ),
        (
            "DeBERTa-v3",
            "DebertaV2",
            {
                **{**TEXT, "position_buckets": 8, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
                **{"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False},
            },
        ),
        (
            "DistilBERT",
            "DistilBert",
            {**SMALL, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
        ),
        ("ELECTRA", "Electra", {**TEXT, "embedding_size": 32}),
        ("ModernBERT", "ModernBert", {**TEXT, **MARKED, "local_attention": 8}),
    )
)
BOTH_WAYS = ("generation", "none")
ENCODER_DECODERS = (
    Family("T5", "T5", {**SMALL, **WIDE}, (*BOTH_WAYS, "sequence"), kind="encoder-decoder"),
    Family(
        "mT5",
        "MT5",
        {**SMALL, **WIDE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        (*BOTH_WAYS, "sequence"),
        kind="encoder-decoder",
    ),
    *(
        Family(
            name,
            stem,
            {**SMALL, **BART, "max_position_embeddings": 128, "decoder_start_token_id": 2},
            (*BOTH_WAYS, "sequence"),
            kind="encoder-decoder",
        )
        for name, stem in (("BART", "Bart"), ("mBART", "MBart"))
    ),
    Family(
        "Whisper",
        "Whisper",
        {
            **{**SMALL, **BART, "max_source_positions": 50, "max_target_positions": 64, "num_mel_bins": 16},
            **{"decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": []},
        },
        BOTH_WAYS,
        reads="audio",
        kind="encoder-decoder",
    ),
)
SEEING = (
    Family("ViT", "ViT", PICTURE, ("image", "none"), reads="image", kind="vision"),
    *(
        Family(
            name,
            stem,
            {"text_config": {**TEXT, "projection_dim": 64}, "vision_config": PICTURE, "projection_dim": 64},
            ("none",),
            reads="both",
            kind="vision",
        )
        for name, stem in (("CLIP", "CLIP"), ("SigLIP", "Siglip"))
    ),
    Family(
        "LLaVA",
        "Llava",
        {
            **{"text_config": {"model_type": "llama", **GATED}, "image_token_index": 250, "image_token_id": 250},
            "vision_config": {"model_type": "clip_vision_model", **PICTURE, "projection_dim": 64},
        },
        ("generation",),
        kind="vision-language",
    ),
    Family(
        "Qwen2-VL",
        "Qwen2VL",
        {
            **{"text_config": {**GATED, "rope_parameters": MROPE}, **IMAGE_IDS},
            **{"vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4}},
            **{"bos_token_id": 1, "eos_token_id": 2},
        },
        ("generation",),
        kind="vision-language",
    ),
    Family(
        "Qwen2.5-VL",
        "Qwen2_5_VL",
        {
            **{"text_config": {**GATED, "rope_parameters": MROPE}, **IMAGE_IDS, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": {**QWEN_EYE, "fullatt_block_indexes": [1], "patch_size": 4, "window_size": 16},
        },
        ("generation",),
        kind="vision-language",
    ),
    Family(
        "Qwen3-VL",
        "Qwen3VL",
        {
            "text_config": {**GATED, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
            "vision_config": {
                **{**QWEN_EYE, "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            },
            **IMAGE_IDS,
        },
        ("generation",),
        kind="vision-language",
    ),
    Family(
        "Gemma 3",
        "Gemma3",
        {
            "text_config": {**GATED, "head_dim": 16, "sliding_window": 8},
            **{"vision_config": PICTURE, "mm_tokens_per_image": 4},
            **{"image_token_index": 250, "boi_token_index": 253, "eoi_token_index": 254},
        },
        ("generation",),
        kind="vision-language",
    ),
)
