"""mlx-lm, by the source of 0.32.2: utils.py and tuner/utils.py. GPTQ with g_idx, which qinit's has, is refused there; a
pack-quantized base is read as 4 bits in groups of 32 whatever it is; an adapter has one rank and one scale, which the
export sees to."""

from __future__ import annotations

from qinit.servers.base import COMPRESSED_TENSORS, DENSE, MLX, AdapterRule, BaseRule, Server

MLX_LM = Server(
    "mlx",
    "mlx-lm 0.32.2",
    {
        DENSE: BaseRule(),
        MLX: BaseRule(bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128)),
        COMPRESSED_TENSORS: BaseRule(bits=(4,), group_sizes=(32,), mixed=False),
    },
    AdapterRule(MLX),
    "`qinit export DIR --to mlx` writes base and adapter as it loads them",
)
