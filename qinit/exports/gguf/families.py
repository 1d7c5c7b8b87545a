"""What llama.cpp calls the parts of a model: one line for each class that was loaded and compared, no other is taken.

Sources: llama.cpp's src/llama-arch.cpp for names and keys, src/models/*.cpp for what each architecture loads,
conversion/llama.py for the order of rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gguf import GGUFWriter

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})
HEAD_NORMS = frozenset({"self_attn.q_norm", "self_attn.k_norm"})
QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp. `neighbours`: its rotary embedding turns neighbouring values of a head, where
    transformers turns those of its two halves, so that rows of q and k change places. `biases` are the parts of a block
    that may have one. `rope_factors`: it reads a factor for each rotary frequency."""

    architecture: str
    neighbours: bool = False
    head_norms: bool = False
    biases: frozenset[str] = QKV
    rope_factors: bool = False

    def place(self, parameter: str) -> str | None:
        """Return what a parameter is called there, None for one that it does not load."""
        module, _, kind = parameter.rpartition(".")
        if module in TOP:
            return f"{TOP[module]}.weight" if kind == "weight" else None
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        if match is None or (match[2] in HEAD_NORMS and not self.head_norms):
            return None
        known = match[2] in IN_BLOCK and (kind == "weight" or (kind == "bias" and match[2] in self.biases))
        return f"blk.{match[1]}.{IN_BLOCK[match[2]]}.{kind}" if known else None

    def order(self, module: str, config: Any) -> torch.Tensor | None:
        """Return which row of a module's weight stands where, None where all stay."""
        heads = {"q_proj": config.num_attention_heads, "k_proj": _kv_heads(config)}.get(module.rpartition(".")[2])
        if heads is None or not self.neighbours:
            return None
        return torch.arange(heads * _head_dim(config)).view(heads, 2, -1).transpose(1, 2).flatten()


_LLAMA = Family("llama", True, biases=frozenset(IN_BLOCK) - NORMS - HEAD_NORMS, rope_factors=True)
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3", head_norms=True),
}


def cannot_compute(family: Family, config: Any) -> str | None:
    """Return what of a configuration llama.cpp computes otherwise, or None."""
    kind, parameters = _rope(config)
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act!r}, and llama.cpp computes silu"
    if kind not in ROPE_KINDS or (kind == "llama3" and not family.rope_factors):
        return f"rope_type {kind!r} is not written"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "a rotary embedding over a part of each head is not written"
    if any(each != "full_attention" for each in getattr(config, "layer_types", None) or ()):
        return "a sliding window in some layers is not written"
    if family.architecture == "qwen2" and config.num_attention_heads * _head_dim(config) != config.hidden_size:
        return "its heads are not as wide together as its hidden states, which llama.cpp expects"
    return None


def add_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    """Write a configuration as llama.cpp's keys. Its context ends where a sliding window over all layers would begin to
    count, as llama.cpp knows none there."""
    from gguf import RopeScalingType

    kind, parameters = _rope(config)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    head_dim = _head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_theta(config, parameters))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])


def rope_factors(config: Any) -> torch.Tensor | None:
    """Return what llama.cpp divides each rotary frequency by, float32 [head_dim / 2]; None where it is 1 or a key says
    it."""
    kind, parameters = _rope(config)
    if kind != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    steps = torch.arange(0, _head_dim(config), 2, dtype=torch.int64).float() / _head_dim(config)
    return 1.0 / (_theta(config, parameters) ** steps) / frequencies


def _rope(config: Any) -> tuple[str, dict[str, Any]]:
    """Return the kind of rotary embedding and its parameters, as transformers 5 or 4 has them."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return parameters.get("rope_type") or parameters.get("type") or "default", parameters


def _theta(config: Any, parameters: dict[str, Any]) -> float:
    return float(parameters.get("rope_theta") or config.rope_theta)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config: Any) -> int:
    return config.num_key_value_heads or config.num_attention_heads
