"""transformers and PEFT. Run: tests/compat loads what qinit writes."""

from __future__ import annotations

from qinit.servers.base import (
    AUTO_ROUND,
    BITSANDBYTES,
    COMPRESSED_TENSORS,
    DENSE,
    GPTQ,
    PEFT,
    AdapterRule,
    BaseRule,
    Server,
)

TRANSFORMERS = Server(
    "transformers",
    "5.23.0 with peft 0.21.2",
    {
        DENSE: BaseRule(),
        GPTQ: BaseRule(bits=(2, 3, 4, 8), mixed=False, packages=("gptqmodel", "optimum")),
        COMPRESSED_TENSORS: BaseRule(bits=(2, 3, 4, 8), zero_points=False, packages=("compressed-tensors",)),
        AUTO_ROUND: BaseRule(
            bits=(2, 3, 4, 8),
            packages=("auto-round",),
            no_adapter="PEFT has no LoRA for the layers that auto-round 0.16.1 computes with",
        ),
        BITSANDBYTES: BaseRule(bits=(4, 8), mixed=False, packages=("bitsandbytes",)),
    },
    AdapterRule(PEFT, everything=True),
    "`qinit export DIR --to dense` writes a base that it loads; qinit.load loads a run's packed mixed widths",
)
