"""A run that memory does not hold as a whole, compared block by block: as the stock classes compute it and as its files
say, with one block of each in memory.

The stock loaders have found every name on the meta device by then. The values are put into a block's modules here, so
that how the loaders read values is not tried, and what lies outside the blocks is compared by its names alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qinit.adapters import WEIGHTS_STEM
from qinit.adapters.base import PREFIX
from qinit.errors import CheckpointError
from qinit.files.tensors import read_header
from qinit.stock.inputs import possible_inputs
from qinit.stream.blocks import Blocks
from qinit.stream.calls import NotStreamable
from qinit.stream.weights import ModelWeights
from qinit.trial.passes import Reached, distance, learn

CPU = torch.device("cpu")


class Stock:
    """The model that stock classes have built on the meta device, with an adapter on it, filled a block at a time."""

    def __init__(self, adapted: Any, weights: ModelWeights, adapter: Path) -> None:
        self.model, self.directory = adapted.get_base_model(), weights.checkpoint.directory
        self.factors = read_header(adapter / f"{WEIGHTS_STEM}.safetensors")
        self.base = copy(weights)
        self.base.adapter = None
        self.parts = {
            f"{name.removesuffix('weight')}{part}": tensor
            for name, parts in weights.packed().items()
            for part, tensor in parts.items()
        }

    def fill(self, path: str, like: nn.Module) -> nn.Module:
        """Return the block at `path` with its values in memory; buffers that no file has are those of `like`."""
        block: nn.Module = self.model.get_submodule(path)
        for name, module in block.named_modules():
            for kind in (module._parameters, module._buffers):
                for last, empty in list(kind.items()):
                    if empty is not None and empty.is_meta:
                        value = self._value(f"{path}.{name}.{last}".replace("..", "."), empty, like, f"{name}.{last}")
                        kind[last] = _as(empty, value)
            made = getattr(module, "post_init", None)  # what a packed layer's kernel makes for itself
            if made is not None and any(each is None for each in module._buffers.values()):
                made()
        return block

    def empty(self, path: str) -> None:
        """Give a block's memory back."""
        for module in self.model.get_submodule(path).modules():
            for kind in (module._parameters, module._buffers):
                for last, value in list(kind.items()):
                    if value is not None:
                        kind[last] = _as(value, value.to("meta"))

    def _value(self, name: str, empty: torch.Tensor, like: nn.Module, within: str) -> torch.Tensor | None:
        """Return a tensor of the block by its name in the model; None for what its module makes for itself."""
        stored = self._stored(name)
        if stored is not None:
            return stored.to(empty.dtype)
        bare = _unwrapped(within)
        known = dict(like.named_buffers()) | dict(like.named_parameters())
        if isinstance(empty, nn.Parameter) and bare not in known:
            raise CheckpointError(f"{self.directory}: no tensor for the parameter {name}")
        return known[bare].to(empty.dtype) if bare in known else None

    def _stored(self, name: str) -> torch.Tensor | None:
        own = _unwrapped(name)
        tensor = self.factors.get(f"{PREFIX}{name.replace('.default.', '.')}") or self.parts.get(own)
        return tensor.read() if tensor is not None else self.base.read(own, CPU)


def _unwrapped(name: str) -> str:
    """Return a tensor's name without what PEFT's wrappers put into it."""
    return re.sub(r"(\.base_layer)+(?=\.)", "", name)


def _as(empty: torch.Tensor, value: torch.Tensor | None) -> Any:
    """Return a value as the kind of tensor that it takes the place of."""
    if value is None or not isinstance(empty, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=empty.requires_grad)


@dataclass(frozen=True)
class Compared:
    """A block by its path: how far what it gives is from what the files say, relative, and what was found of its
    gradients, as `learn` yields it."""

    path: str
    apart: float
    learned: tuple[tuple[bool, str], ...]


def compare_blocks(adapted: Any, weights: ModelWeights, adapter: Path, run: Path) -> Iterator[Compared]:
    """Run both models' blocks on the same hidden states, one after the other.

    Raises NotStreamable for a model that is no rows of blocks that takes tokens, CheckpointError for a tensor that is
    not there.
    """
    blocks, stock = Blocks(weights, CPU), Stock(adapted, weights, adapter)
    tokens = next((each["input_ids"] for each in possible_inputs(blocks.model, run) if "input_ids" in each), None)
    if tokens is None:
        raise NotStreamable("it reads no tokens")
    ends: list[torch.Tensor | None] = []
    for row in blocks.rows:
        with blocks.surroundings(), torch.no_grad():
            start = row.start(tokens, None, ends)
        if start is None:
            ends.append(None)
            continue
        hidden, made = start.hidden.detach(), [each.detach() for each in start.made]
        for index, call in enumerate(start.calls):
            path, run_block = row.prefix(index).removesuffix("."), call.filled(made)
            theirs = stock.fill(path, row.load(index))
            reached = Reached(theirs)
            found = run_block(theirs, hidden)
            with torch.no_grad():
                expected = run_block(row.blocks[index], hidden)
            learned = tuple(learn([found], theirs, reached))
            yield Compared(path, distance([found.detach()], [expected]), learned)
            reached.close()
            row.unload(index)
            stock.empty(path)
            hidden = expected
        ends.append(hidden)
