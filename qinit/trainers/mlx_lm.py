"""mlx-lm, whose adapters have a form of their own."""

from __future__ import annotations

from qinit.trainers.base import Untrainable


class MlxLmTrainer(Untrainable):
    name = "mlx-lm"
    title = "mlx-lm"
    seen = "by the source of mlx-lm (d78bf58)"
    reason = (
        "it reads adapters in a form of its own (adapters.safetensors with lora_a and lora_b transposed, one rank and "
        "one scale for all layers: mlx_lm/tuner), and of GPTQ only 4 bits without g_idx (mlx_lm/utils.py); train with "
        "--trainer trl or transformers, merge, and convert the merged model with mlx_lm.convert"
    )
