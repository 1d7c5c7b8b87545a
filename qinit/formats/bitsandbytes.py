"""bitsandbytes NF4, as transformers saves it: 4-bit codes of levels at the quantiles of a normal distribution.

    X.weight        uint8 [out*in/2, 1]   row by row, the even one of two values in the high half
    X.weight.absmax f32 [out*in/block]    or uint8 with X.weight.nested_absmax and nested_quant_map ("double quant")
    X.weight.quant_state.bitsandbytes__nf4   what else there is to know, JSON as bytes

W = level * absmax, rounded to the dtype that the JSON names. The levels are bitsandbytes' own whatever quant_map says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor
from qinit.formats.reader import Reader, method_of, require_shape
from qinit.linalg.chunks import row_chunks
from qinit.source.checkpoint import read_finite
from qinit.source.targets import LinearModule

STATE = "weight.quant_state.bitsandbytes__nf4"
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STATE_BYTES = 1 << 16


class BitsandbytesReader(Reader):
    name = "bitsandbytes"
    title = "bitsandbytes NF4"
    exact = False
    packages = ("bitsandbytes",)
    parts = ("weight", "weight.absmax", STATE)
    more_parts = ("weight.nested_absmax", "weight.nested_quant_map")
    packed_experts_note = "transformers has experts as slices of 3-D parameters, and bitsandbytes packs linear layers"

    def recognises(self, config: dict[str, Any]) -> bool:
        return method_of(config) == "bitsandbytes"

    def cannot_read(self, config: dict[str, Any]) -> str | None:
        quantization = config["quantization_config"]
        kind = quantization.get("bnb_4bit_quant_type", "fp4") if quantization.get("load_in_4bit") else "8 bits"
        return None if kind == "nf4" else f"bitsandbytes {kind}, and nf4 alone is read"

    def grid_of(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any]
    ) -> tuple[int, int]:
        block = _state(parts[STATE])["blocksize"]
        count = module.out_features * module.in_features
        require_shape(parts["weight"], (-(-count // 2), 1), (1, -(-count // 2)))
        require_shape(parts["weight.absmax"], (-(-count // block),))
        return 4, block

    def read(
        self, module: LinearModule, parts: Mapping[str, StoredTensor], config: dict[str, Any], device: torch.device
    ) -> torch.Tensor:
        _, block = self.grid_of(module, parts, config)
        state, levels = _state(parts[STATE]), torch.tensor(NF4, device=device)
        absmax, packed = _absmax(parts, state).to(device), parts["weight"].read().flatten().to(device)
        count = module.out_features * module.in_features
        result = torch.empty(count, device=device)
        for blocks in row_chunks(len(absmax), block, device=device):
            values = slice(blocks.start * block, min(blocks.stop * block, count))
            pairs = packed[values.start // 2 : -(-values.stop // 2)].int()
            codes = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[: values.stop - values.start]
            scales = absmax[blocks].repeat_interleave(block)[: len(codes)]
            result[values] = (levels[codes] * scales).to(DTYPES[state["dtype"]]).float()
        return result.reshape(module.out_features, module.in_features)


def _state(tensor: StoredTensor) -> dict[str, Any]:
    """Return the JSON of a layer. Raises CheckpointError where it is none that bitsandbytes writes."""
    try:
        state = json.loads(tensor.first_bytes(STATE_BYTES))
        block = state["blocksize"]
        if type(block) is not int or block < 2 or block % 2 or state["dtype"] not in DTYPES:
            raise ValueError(f"blocksize {block!r}, dtype {state['dtype']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{tensor.file}: tensor '{tensor.name}' is no quant_state of nf4 ({error})") from None
    return state


def _absmax(parts: Mapping[str, StoredTensor], state: dict[str, Any]) -> torch.Tensor:
    absmax, tensor = read_finite(parts["weight.absmax"]), parts["weight.absmax"]
    if "nested_blocksize" not in state:
        return absmax.float()
    try:
        largest, table = (read_finite(parts[part]).float() for part in BitsandbytesReader.more_parts)
        scales = largest.repeat_interleave(int(state["nested_blocksize"]))[: len(absmax)]
        return table[absmax.int()] * scales + float(state["nested_offset"])
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{tensor.file}: tensor '{tensor.name}' lacks its own scales ({error})") from None
