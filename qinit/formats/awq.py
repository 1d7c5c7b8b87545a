"""AWQ (gemm), as others write it: 4 bits, packed along the outputs, eight of them to a word in an order of their own.

    X.qweight int32 [in, out/8]    X.qzeros int32 [in/g, out/8]
    X.scales  f16   [in/g, out]    W[n,k] = scales[k//g, n] * (q[k,n] - z[k//g, n])

As gptqmodel (`quantization/awq/utils/packing_utils.py`), which transformers loads it with, reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qinit.files.tensors import StoredTensor
from qinit.formats.gptq.packing import unpack_rows
from qinit.formats.reader import Reader, method_of, require_shape
from qinit.linalg.chunks import row_chunks
from qinit.source.checkpoint import read_finite
from qinit.source.targets import LinearModule

BITS = 4
PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where in its word each of eight outputs is


class AwqReader(Reader):
    name = "awq"
    title = "AWQ"
    exact = False
    adapters = ("lora",)
    packages = ("gptqmodel",)
    moves_scales = True
    head_note = "transformers leaves the head out when it loads AWQ, and starts it at random"
    parts = ("qweight", "qzeros", "scales")

    def recognises(self, config: dict[str, Any]) -> bool:
        return method_of(config) == "awq"

    def cannot_read(self, config: dict[str, Any]) -> str | None:
        quantization = config["quantization_config"]
        version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
        bits = quantization.get("bits", quantization.get("w_bit", BITS))
        if version != "gemm" or bits != BITS:
            return f"awq as {version} of {bits} bits, and gemm of {BITS} bits alone is read"
        return None

    def grid_of(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]
    ) -> tuple[int, int]:
        quantization, outputs, inputs = config["quantization_config"], module.out_features, module.in_features
        group_size = int(quantization.get("group_size", quantization.get("q_group_size", 128)))
        group_size = inputs if group_size < 1 else group_size
        groups, words = -(-inputs // group_size), outputs * BITS // 32
        for part, shape in zip(self.parts, ((inputs, words), (groups, words), (groups, outputs)), strict=True):
            require_shape(parts[part], shape)
        return BITS, group_size

    def read(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any], device: torch.device
    ) -> torch.Tensor:
        _, group_size = self.grid_of(module, parts, config)
        qweight, qzeros, scales = (read_finite(parts[part], device) for part in self.parts)
        zeros, scales = _unpacked(qzeros, module.out_features), scales.float()
        result = torch.empty((module.out_features, module.in_features), device=device)
        for rows in row_chunks(module.in_features, module.out_features, device=device):
            groups = torch.arange(rows.start, rows.stop, device=device) // group_size
            codes = _unpacked(qweight[rows], module.out_features)
            result[:, rows] = ((codes - zeros[groups]) * scales[groups]).half().float().T
        return result


def _unpacked(packed: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return the codes [rows, outputs] in float32."""
    codes = unpack_rows(packed, BITS, outputs).float()
    return codes.unflatten(1, (-1, 8))[..., PLACES].flatten(1)
