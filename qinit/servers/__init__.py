"""Servers: which bases each of them loads and what of an adapter it takes, by its source or by runs.

To add one: one file with a Server, one line in SERVERS, and a row in docs/serving.md.
"""

from __future__ import annotations

from qinit.servers.base import AdapterRule, BaseRule, Server
from qinit.servers.llama_cpp import LLAMA_CPP
from qinit.servers.mlx import MLX_LM
from qinit.servers.transformers import TRANSFORMERS
from qinit.servers.vllm import VLLM

SERVERS: dict[str, Server] = {server.name: server for server in (TRANSFORMERS, VLLM, LLAMA_CPP, MLX_LM)}

__all__ = ["SERVERS", "AdapterRule", "BaseRule", "Server"]
