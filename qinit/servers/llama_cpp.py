"""llama.cpp, by its source (0b03ada) and by llama-cpp-python 0.3.36: bases and adapters are GGUF files."""

from __future__ import annotations

from qinit.servers.base import GGUF, AdapterRule, BaseRule, Server

LLAMA_CPP = Server(
    "llama.cpp",
    "0b03ada",
    {GGUF: BaseRule()},
    AdapterRule(GGUF, rslora=False),
    "`qinit export DIR --to gguf` writes base and adapter as it loads them, the adapter's scales folded into B",
)
