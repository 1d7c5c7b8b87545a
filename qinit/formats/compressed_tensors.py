"""compressed-tensors, pack-quantized, as llm-compressor writes it: a bit stream along the inputs.

    X.weight_packed int32 [out, ceil(in*b/32)]  q + 2^(b-1), little-endian
    X.weight_scale  [out, in/g], [out, 1] or [1]
    X.weight_zero_point int32 [ceil(out*b/32), in/g]  asymmetric ones; packed along the outputs in the same way
    X.weight_g_idx  int32 [in]  the group of each input, where groups follow the activations

W = (q - z) s, rounded to the type of the scales. As compressed_tensors/compressors/pack_quantized reads it since 0.13;
before that the 3-bit codes stood ten to a word, which is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.formats.gptq.packing import unpack_rows
from qinit.formats.reader import Reader, method_of, require_shape
from qinit.linalg.chunks import row_chunks
from qinit.source.checkpoint import read_finite
from qinit.source.targets import LinearModule

FORMAT = "pack-quantized"
ZEROS, GROUPS = "weight_zero_point", "weight_g_idx"
WIDTHS = range(2, 9)


class CompressedTensorsReader(Reader):
    name = "compressed-tensors"
    title = "compressed-tensors"
    packages = ("compressed_tensors",)
    moves_scales = True
    exact = False  # in float32 it keeps products that `read`, as in its own type, rounds
    opening = "base.hf_quantizer.compressor.decompress_model(base)"  # PEFT wants weights, and they are packed till then
    parts = ("weight_packed", "weight_scale")
    more_parts = ("weight_shape", ZEROS, GROUPS)
    packed_experts_note = "transformers unpacks them while it loads the base, without their zero points"

    def recognises(self, config: dict[str, Any]) -> bool:
        return method_of(config) == "compressed-tensors"

    def opened(self, base: Any) -> Any:
        base.hf_quantizer.compressor.decompress_model(base)
        return base

    def cannot_read(self, config: dict[str, Any]) -> str | None:
        quantization = config["quantization_config"]
        groups = quantization.get("config_groups")
        schemes = [each for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
        forms = {each.get("format") or quantization.get("format") for each in schemes}
        other = sorted(str(form) for form in forms | {quantization.get("format")} if form not in (FORMAT, None))
        if other or not schemes:
            return f"compressed-tensors as {' and '.join(other) or 'nothing'}, and {FORMAT} alone is read"
        if any(each.get("input_activations") for each in schemes):
            return "compressed-tensors with quantized activations, and quantized weights alone are read"
        return None

    def grid_of(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]
    ) -> tuple[int, int]:
        outputs, inputs, packed, scale = module.out_features, module.in_features, *(parts[p] for p in self.parts)
        words = packed.shape[-1]
        bits = next((width for width in WIDTHS if -(-inputs * width // 32) == words), None)
        if bits is None:
            raise CheckpointError(
                f"{packed.file}: tensor '{packed.name}' has {words} words for {inputs} inputs, which is a bit stream "
                "of no width from 2 to 8; it was packed by another version of compressed-tensors"
            )
        require_shape(packed, (outputs, words))
        groups = scale.shape[-1] if scale.shape else 1
        if groups < 1 or inputs % groups:
            raise CheckpointError(f"{scale.file}: tensor '{scale.name}': {inputs} inputs are not {groups} groups")
        require_shape(scale, (outputs, groups), *([(1,), ()] if groups == 1 else []))
        if ZEROS in parts:
            require_shape(parts[ZEROS], (-(-outputs * bits // 32), groups))
        return bits, inputs // groups

    def read(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any], device: torch.device
    ) -> torch.Tensor:
        bits, group_size = self.grid_of(module, parts, config)
        outputs, inputs = module.out_features, module.in_features
        packed, stored = (read_finite(parts[part], device) for part in self.parts)
        scales = stored.float().reshape(-1, inputs // group_size).expand(outputs, -1)
        zeros = torch.full_like(scales, float(1 << (bits - 1)))  # of the codes as they are packed
        if ZEROS in parts:
            zeros = unpack_rows(parts[ZEROS].read().to(device).T.contiguous(), bits, outputs).T.float()
        groups = torch.arange(inputs, device=device) // group_size
        if GROUPS in parts and not bool(((order := parts[GROUPS].read().to(device).long()) < 0).any()):
            groups = order
        result = torch.empty((outputs, inputs), device=device)
        for rows in row_chunks(outputs, inputs, device=device):
            codes = unpack_rows(packed[rows], bits, inputs).float()
            result[rows] = ((codes - zeros[rows][:, groups]) * scales[rows][:, groups]).to(stored.dtype).float()
        return result
