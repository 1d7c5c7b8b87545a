"""vLLM, by the source of 0.32.0: lora/peft_helper.py, config/lora.py, layers/quantization/auto_gptq.py,
layers/quantization/inc, and schemes/compressed_tensors_wNa16.py."""

from __future__ import annotations

from qinit.servers.base import AUTO_ROUND, COMPRESSED_TENSORS, DENSE, GPTQ, PEFT, AdapterRule, BaseRule, Server

VLLM = Server(
    "vllm",
    "0.32.0",
    {
        DENSE: BaseRule(),
        GPTQ: BaseRule(bits=(4, 8), zero_points=False),
        COMPRESSED_TENSORS: BaseRule(bits=range(2, 9)),
        AUTO_ROUND: BaseRule(bits=range(2, 9)),
    },
    AdapterRule(
        PEFT,
        most_rank=16,
        rank_option="--max-lora-rank",
        rank_choices=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        whole=("classifier", "score"),
        since="versions of 2025 (e745baf) read r and lora_alpha alone",
    ),
    "`qinit export DIR --to compressed-tensors` writes a base that it loads",
    fuses=True,
)
