"""What stands in a GGUF file: every tensor with its name there, its type and how its bytes are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qinit.exports.finished import FinishedRun
from qinit.exports.gguf.blocks import BlockType, smallest
from qinit.exports.gguf.families import FAMILIES, Family, rope_factors
from qinit.exports.lora import factors
from qinit.grids import Quantized
from qinit.source.targets import LinearModule

CPU = torch.device("cpu")


@dataclass(frozen=True)
class FloatType:
    """A type that stores each number for itself."""

    name: str
    number: int
    file_type: int
    dtype: torch.dtype

    def row_bytes(self, in_features: int) -> int:
        return in_features * self.dtype.itemsize


F32 = FloatType("F32", 0, 0, torch.float32)
F16 = FloatType("F16", 1, 1, torch.float16)
BF16 = FloatType("BF16", 30, 32, torch.bfloat16)
FLOATS = (F32, F16, BF16)


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: `shape` is [out, in] or [out], `order` says which row of the parameter stands where."""

    name: str
    type: BlockType | FloatType
    shape: tuple[int, ...]
    parameter: str
    module: LinearModule | None = None
    order: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows * self.type.row_bytes(self.shape[-1])

    def read(self, run: FinishedRun) -> torch.Tensor:
        """Return its bytes, uint8."""
        if isinstance(self.type, BlockType):
            assert self.module is not None
            grid, parts = run.weights.grid(self.module), run.weights.packed_parts(self.module)
            if grid is not None and parts is not None and grid.bits == self.type.stream:
                words = parts["qweight"].read()
                if (order := self.order) is not None:
                    grid, words = _rows(grid, order), words[:, order]
                return self.type.encode_words(grid, words)
            quantized = run.weights.codes(self.module)
            assert quantized is not None
            assert quantized.zeros is not None
            if (order := self.order) is not None:
                quantized = _rows(quantized, order)
            return self.type.encode(quantized)
        value = run.weights.read(self.parameter, CPU)
        assert value is not None
        value = value if self.order is None else value[self.order]
        return value.to(self.type.dtype).flatten().view(torch.uint8)


def _rows(quantized: Quantized, order: torch.Tensor) -> Quantized:
    rows = {key: getattr(quantized, key)[order] for key in ("codes", "scales", "zeros")}
    return replace(quantized, **rows)


def family_of(run: FinishedRun) -> Family | None:
    return FAMILIES.get(run.architecture.class_name)


def without_place(run: FinishedRun, family: Family) -> str | None:
    """Return a parameter that a family has no name for, or that is not stored; None if there is none."""
    missing = (name for name in _parameters(run) if family.place(name) is None or not run.weights.has(name))
    return next(missing, None)


def base_layout(run: FinishedRun, family: Family) -> Iterator[Tensor]:
    """Yield the tensors of the base, in the model's order, but for `rope_tensor`."""
    config = model_config(run)
    modules = {f"{module.name}.weight": module for module in run.architecture.linear}
    shapes = model_shapes(run)
    for parameter in _parameters(run):
        name, module = family.place(parameter), modules.get(parameter)
        assert name is not None
        order = family.order(parameter.rpartition(".")[0], config)
        yield Tensor(
            name, _type(run, parameter, module, shapes[parameter]), shapes[parameter], parameter, module, order
        )


def rope_tensor(run: FinishedRun) -> tuple[str, torch.Tensor] | None:
    """Return the factors of the rotary frequencies by their name, where the model has some."""
    found = rope_factors(model_config(run))
    return None if found is None else ("rope_freqs.weight", found)


def adapter_layout(run: FinishedRun, family: Family, alpha: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the adapter by name, in float32. llama.cpp multiplies B A with `alpha` over its rank."""
    config = model_config(run)
    for each in factors(run):
        name = family.place(f"{each.module.name}.weight")
        order = family.order(each.module.name, config)
        a, b = each.read(alpha / each.rank)
        yield f"{name}.lora_a", a
        yield f"{name}.lora_b", b if order is None else b[order]


def model_config(run: FinishedRun) -> Any:
    assert run.architecture.naming is not None
    return run.architecture.naming.model.config


def model_shapes(run: FinishedRun) -> dict[str, tuple[int, ...]]:
    assert run.architecture.naming is not None
    return {name: tuple(value.shape) for name, value in run.architecture.naming.model.state_dict().items()}


def _parameters(run: FinishedRun) -> list[str]:
    """Return the model's parameters in its order; without a head that is the embedding once more."""
    return [name for name in model_shapes(run) if name != "lm_head.weight" or run.weights.has(name)]


def _type(
    run: FinishedRun, parameter: str, module: LinearModule | None, shape: tuple[int, ...]
) -> BlockType | FloatType:
    """Return what holds a parameter to the last bit; but embedding and head of a bfloat16 model are float16, as
    llama.cpp's converter has them: its kernels round what meets bfloat16 weights to bfloat16."""
    if len(shape) < 2:
        return F32
    grid = None if module is None else run.weights.grid(module)
    if grid is not None:  # a layer that no type holds is float16, as the stock kernel rounds it to
        return smallest(grid, shape[-1]) or F16
    stored = run.weights.names.find(parameter)
    dtype = torch.float32 if stored is None else stored.dtype
    if dtype == torch.bfloat16:
        return BF16 if module is not None else F16
    return F16 if dtype == torch.float16 else F32
