"""GGUF, the format of llama.cpp."""

from qinit.exports.gguf.export import GgufExport

__all__ = ["GgufExport"]
