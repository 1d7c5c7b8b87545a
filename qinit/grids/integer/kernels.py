"""What runs the integer grid's inner loops: numba on a CPU, Triton on a GPU, plain torch where there is neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True)
class Kernels:
    """The search of `IntegerGrid.quantize`, and the block steps of rounding under H; arguments and results are those of
    `search_torch` and `rounding_torch`."""

    quantize: Callable[..., Any]
    feed_back_block: Callable[..., None]
    descend_block: Callable[..., None]


def kernels_for(device: torch.device) -> Kernels:
    """Return the fastest that there is for a device."""
    if device.type == "cpu":
        return _of_numba()
    return _of_triton() if find_spec("triton") is not None else _of_torch()


@cache
def _of_numba() -> Kernels:
    from qinit.grids.integer.rounding_cpu import descend_block, feed_back_block  # late: numba is slow to import
    from qinit.grids.integer.search_cpu import quantize_cpu

    return Kernels(quantize_cpu, feed_back_block, descend_block)


@cache
def _of_triton() -> Kernels:
    from qinit.grids.integer.rounding_triton import descend_block_triton, feed_back_block_triton
    from qinit.grids.integer.search_triton import quantize_triton

    return Kernels(quantize_triton, feed_back_block_triton, descend_block_triton)


@cache
def _of_torch() -> Kernels:
    from qinit.grids.integer.rounding_torch import descend_block_torch, feed_back_block_torch
    from qinit.grids.integer.search_torch import quantize_torch

    return Kernels(quantize_torch, feed_back_block_torch, descend_block_torch)
