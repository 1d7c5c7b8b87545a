"""A model as rows of blocks of which only one has its weights in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from qinit.plan.plan import Plan
from qinit.source.checkpoint import Checkpoint
from qinit.source.skeleton import build_model, without_cache
from qinit.stream.calls import NotStreamable
from qinit.stream.feeding import inputs_of
from qinit.stream.rows import Ends, Row, frozen, put
from qinit.stream.stored import can_be_held, computing_in_float32
from qinit.stream.weights import ModelWeights


class Weights(Protocol):
    """Where a model's parameters come from. `linear` names the modules that its rows of blocks are known by."""

    checkpoint: Checkpoint
    trust_remote_code: bool
    linear: Sequence[str]

    def has(self, name: str) -> bool:
        """Whether there is a parameter of that name, as the model has it."""
        ...

    def read(self, name: str, device: torch.device, *, stored: bool = False) -> torch.Tensor | None:
        """Return it in float32 on the device, in the module's own layout; None if there is none. As it is `stored`, if
        asked for and in 16 bits."""
        ...

    def announce(self, prefix: str) -> None:
        """Have the system fetch the parameters whose names begin so, as they will be read next."""
        ...

    def same(self, one: str, other: str) -> bool:
        """Whether two parameters that are both there hold the same."""
        ...

    def in_language(self, name: str) -> bool:
        """Whether a parameter is of the part of the model that reads text."""
        ...


class Blocks:
    """A model whose linear layers lie in rows of blocks, all of it on the meta device until a part is loaded.

    Raises NotStreamable for a model without such a row, and for a checkpoint that does not hold its blocks one by one.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self.weights, self.device = weights, device
        trusted = weights.trust_remote_code
        self.model = build_model(weights.checkpoint, include_buffers=False, trust_remote_code=trusted).eval()
        without_cache(self.model)
        for path, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:  # some are trained, such as Gemma 4's layer_scalar
                    stored = self.read(f"{path}.{name}")
                    module._buffers[name] = buffer.to(device) if stored is None else stored.to(buffer.dtype)
        reading = [name for name in weights.linear if weights.in_language(name)] or weights.linear
        self.rows = tuple(Row(self, path, blocks) for path, blocks in _rows_of_blocks(self.model, reading))
        self.model.tie_weights()  # built without memory, each has become a parameter of its own
        paths = tuple(row.path + "." for row in self.rows)
        output = self.model.get_output_embeddings()
        ends = tuple(path + "." for path, module in self.model.named_modules() if module is output)
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        # What sees or hears is never run, but a model takes the place of its first parameter for its own.
        linear = set(weights.linear)
        beside = {names[0], *(name for name in names if name.rpartition(".")[0] in linear)}
        needed = [name for name in names if name in beside or weights.in_language(name) or name.startswith(ends)]
        outside = [name for name in needed if not name.startswith(paths)]
        self._untie(outside)
        first: dict[int, str] = {}
        self.outside = {  # parameters that lie in no block, each with the first name of the one that it is tied to
            name: first.setdefault(id(self.model.get_parameter(name)), name) for name in outside
        }
        self.head = {name for name in outside if name.startswith(ends)}
        self.missing = [  # some checkpoints name the head as older versions of the model did
            name for name, same_as in self.outside.items() if not weights.has(same_as) and not weights.has(name)
        ]
        for row in self.rows:
            row.require_streamable()

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> Blocks:
        """The blocks of a plan's source, known by the layers that will be quantized."""
        linear = [layer.target.name for layer in plan.quantized]
        trusted = plan.recipe.trust_remote_code
        return cls(ModelWeights(plan.checkpoint, plan.architecture, linear, trust_remote_code=trusted), device)

    def _untie(self, names: Sequence[str]) -> None:
        """Give a parameter of its own to what the configuration ties but the checkpoint stores as something else, as
        the loader does."""
        first: dict[int, str] = {}
        for name in names:
            parameter = self.model.get_parameter(name)
            same_as = first.setdefault(id(parameter), name)
            both = name != same_as and self.weights.has(name) and self.weights.has(same_as)
            if both and not self.weights.same(name, same_as):
                put(self.model, name, frozen(torch.empty_like(parameter, device="meta")))

    def require_whole(self) -> None:
        """Raise NotStreamable for what lies outside of the blocks and is not in the checkpoint."""
        if self.missing:
            raise NotStreamable(f"the checkpoint has no tensor {self.missing[0]}")

    @contextmanager
    def surroundings(
        self,
        *,
        head: bool = False,
        others: Mapping[str, nn.Parameter] = MappingProxyType({}),
        trained: bool = False,
    ) -> Iterator[dict[str, nn.Parameter]]:
        """Have what lies before the blocks (embeddings, positions) in memory, with the output head if asked for; it is
        given back at the end. Gives it by name; what is equal in `others`, another model's, is not held twice. Large
        matrices stay as they are stored, unless the model is to be `trained`."""
        loaded: dict[str, nn.Parameter] = {}
        empty = {name: self.model.get_parameter(name) for name in self.outside}
        try:
            for name, same_as in self.outside.items():
                if name in self.head and not head:
                    continue
                if same_as not in loaded:
                    stored = not trained and self._as_stored(same_as)
                    value = self.read(same_as, stored=stored)
                    value = self.read(name, stored=stored) if value is None else value
                    if value is None:  # never reached, or it ends the pass with an error
                        continue
                    other = others.get(same_as)
                    same = other is not None and other.shape == value.shape and torch.equal(other, value)
                    loaded[same_as] = other if other is not None and same else frozen(value)
                    del value  # where it is not held twice
                put(self.model, name, loaded[same_as])
            with computing_in_float32(self.model, self.device):
                yield loaded
        finally:
            for name, parameter in empty.items():
                put(self.model, name, parameter)

    def _as_stored(self, parameter: str) -> bool:
        """Whether all modules that have a parameter can compute with it as it is stored; not where it is measured."""
        names = [name for name, same_as in self.outside.items() if same_as == parameter]
        owners = [path for path, _, last in (name.rpartition(".") for name in names) if last == "weight"]
        held = [path for path in owners if path not in self.weights.linear]
        return len(held) == len(names) and all(can_be_held(self.model.get_submodule(path)) for path in held)

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a parameter of that name."""
        return self.weights.has(name)

    def read(self, name: str, *, stored: bool = False) -> torch.Tensor | None:
        """Return a parameter in float32 on the device, None if the checkpoint has none of that name; as it is `stored`,
        if asked for and in 16 bits."""
        return self.weights.read(name, self.device, stored=stored)

    def announce(self, prefix: str) -> None:
        """Have the system fetch the parameters whose names begin so, as they will be read next."""
        self.weights.announce(prefix)

    def run(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> Any:
        """Run the model on tokens [batch, length]."""
        mask = None if mask is None else mask.to(self.device)
        return self.model(**inputs_of(self.model, tokens.to(self.device), mask))

    def after(self, tokens: torch.Tensor, mask: torch.Tensor | None, ends: Ends) -> Any:
        """Return the model's outputs for a batch that its rows take to `ends`, the hidden states behind each; needs the
        head in memory."""
        try:
            with ExitStack() as places:
                for row, end in zip(self.rows, ends, strict=True):
                    places.enter_context(row.giving(end))
                return self.run(tokens, mask)
        except Exception as error:  # a model can do anything behind its blocks
            raise NotStreamable(f"the model does not run on from its blocks ({error})") from error


def _rows_of_blocks(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.ModuleList]]:
    """Return the module lists whose members hold all of `names` that lie in a list at all, in the model's order."""
    rows: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(row + ".") for row in rows)
        if isinstance(module, nn.ModuleList) and not inside and any(name.startswith(path + ".") for name in names):
            rows[path] = module
    if not rows:
        raise NotStreamable("the model has no blocks")
    return list(rows.items())
