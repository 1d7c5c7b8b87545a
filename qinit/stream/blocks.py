"""A model as rows of blocks of which only one has its weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from qinit.plan.plan import Plan
from qinit.source.checkpoint import Checkpoint
from qinit.source.skeleton import build_model, without_cache
from qinit.stream.weights import ModelWeights

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Weights(Protocol):
    """Where a model's parameters come from. `linear` names the modules that its rows of blocks are known by."""

    checkpoint: Checkpoint
    trust_remote_code: bool
    linear: Sequence[str]

    def has(self, name: str) -> bool:
        """Whether there is a parameter of that name, as the model has it."""
        ...

    def read(self, name: str, device: torch.device) -> torch.Tensor | None:
        """Return it in float32 on the device, in the module's own layout; None if there is none."""
        ...

    def same(self, one: str, other: str) -> bool:
        """Whether two parameters that are both there hold the same."""
        ...

    def in_language(self, name: str) -> bool:
        """Whether a parameter is of the part of the model that reads text."""
        ...


class NotStreamable(Exception):  # noqa: N818
    """The model is no single row of blocks, or its checkpoint does not hold them one by one."""


class Stop(Exception):  # noqa: N818
    """Ends a forward pass once it has delivered what it was started for."""


class Call:
    """How a model calls one of its blocks: all arguments but the hidden states."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.by_name = not args
        self.args = args[1:]
        self.kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run the block on `hidden` [batch, length, width] and return its output, of the same shape."""
        output = (
            block(hidden_states=hidden, **self.kwargs) if self.by_name else block(hidden, *self.args, **self.kwargs)
        )
        return output[0] if isinstance(output, tuple) else output


def alike(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are the same as far as can be seen: tensors, and what holds them."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    return type(one) is type(other)


class _StandIn(nn.Module):
    """Has a block's place and its attributes, but not its weights."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.__dict__["real"] = real  # not a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)  # such as attention_type, which some models ask a block for


class _Through(_StandIn):
    """Returns the same hidden states whatever it is given."""

    def __init__(self, real: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__(real)
        self.__dict__["hidden"] = hidden

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.__dict__["hidden"]


class _Stub(_StandIn):
    """Keeps a block's arguments and returns the first block's hidden states."""

    def __init__(self, real: nn.Module, kept: list[Arguments], count: int) -> None:
        super().__init__(real)
        self.kept, self.count = kept, count

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.kept.append((args, kwargs))
        if len(self.kept) == self.count:
            raise Stop
        return _hidden(self.kept[0])


def _hidden(arguments: Arguments) -> torch.Tensor:
    args, kwargs = arguments
    return args[0] if args else kwargs["hidden_states"]


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
                _put(self.model, name, _frozen(torch.empty_like(parameter, device="meta")))

    @property
    def row(self) -> Row:
        """The only row. Raises NotStreamable where there are more: what one hands to the next is not carried."""
        if len(self.rows) != 1:
            raise NotStreamable(f"the layers lie in {len(self.rows)} rows of blocks")
        return self.rows[0]

    def require_whole(self) -> None:
        """Raise NotStreamable for what lies outside of the blocks and is not in the checkpoint."""
        if self.missing:
            raise NotStreamable(f"the checkpoint has no tensor {self.missing[0]}")

    @contextmanager
    def surroundings(
        self, *, head: bool = False, others: Mapping[str, nn.Parameter] = MappingProxyType({})
    ) -> Iterator[dict[str, nn.Parameter]]:
        """Have what lies before the blocks (embeddings, positions) in memory, with the output head if asked for; it is
        given back at the end. Gives it by name; what is equal in `others`, another model's, is not held twice."""
        loaded: dict[str, nn.Parameter] = {}
        empty = {name: self.model.get_parameter(name) for name in self.outside}
        try:
            for name, same_as in self.outside.items():
                if name in self.head and not head:
                    continue
                if same_as not in loaded:
                    value = self.read(same_as)
                    value = self.read(name) if value is None else value
                    if value is None:  # never reached, or it ends the pass with an error
                        continue
                    other = others.get(same_as)
                    same = other is not None and other.shape == value.shape and torch.equal(other, value)
                    loaded[same_as] = other if other is not None and same else _frozen(value)
                _put(self.model, name, loaded[same_as])
            yield loaded
        finally:
            for name, parameter in empty.items():
                _put(self.model, name, parameter)

    def read(self, name: str) -> torch.Tensor | None:
        """Return a parameter in float32 on the device, None if the checkpoint has none of that name."""
        return self.weights.read(name, self.device)


class Row:
    """A row of blocks, each of which takes what the one before it gives."""

    def __init__(self, model: Blocks, path: str, blocks: nn.ModuleList) -> None:
        self._owner, self.path, self.blocks = model, path, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def prefix(self, index: int) -> str:
        """Return the dotted name of a block, with a dot at its end."""
        return f"{self.path}.{index}."

    def require_streamable(self) -> None:
        """Raise NotStreamable for blocks that need each other, and for weights that the checkpoint lacks."""
        if any(getattr(module, "is_kv_shared_layer", False) for module in self.blocks.modules()):
            raise NotStreamable("some blocks use the keys and values of others")
        for name, _ in self.blocks.named_parameters(remove_duplicate=False):
            if not self._owner.weights.has(f"{self.path}.{name}"):
                raise NotStreamable(f"the checkpoint has no tensor {self.path}.{name}")

    def calls(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, list[Call]]:
        """Run a batch as far as the blocks; return the first one's hidden states and how each block is called."""
        kept: list[Arguments] = []
        count = len(self)
        try:
            with self._replaced(lambda block: _Stub(block, kept, count)):
                self._run(tokens, mask)
        except Stop:
            pass
        except Exception as error:  # a model can do anything between its blocks
            raise NotStreamable(f"the model does not run without its blocks ({error})") from error
        if len(kept) != count:
            raise NotStreamable(f"{len(kept)} of {count} blocks were called")
        hidden = _hidden(kept[0])
        if hidden.shape[:-1] != tokens.shape:
            raise NotStreamable(f"the blocks take hidden states of shape {list(hidden.shape)}")
        return hidden, [Call(*arguments) for arguments in kept]

    def after(self, tokens: torch.Tensor, mask: torch.Tensor | None, hidden: torch.Tensor) -> Any:
        """Return the model's outputs for a batch whose last block gives `hidden`; needs the head in memory."""
        try:
            with self._replaced(lambda block: _Through(block, hidden)):
                return self._run(tokens, mask)
        except Exception as error:  # a model can do anything behind its blocks
            raise NotStreamable(f"the model does not run on from its blocks ({error})") from error

    @contextmanager
    def _replaced(self, stand_in: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
        real = list(self.blocks)
        for index, block in enumerate(real):
            self.blocks[index] = stand_in(block)
        try:
            yield
        finally:
            for index, block in enumerate(real):
                self.blocks[index] = block

    def _run(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> Any:
        device = self._owner.device
        return self._owner.model(input_ids=tokens.to(device), attention_mask=None if mask is None else mask.to(device))

    def load(self, index: int) -> nn.Module:
        """Return one block with its weights in float32 on the device."""
        block = self.blocks[index]
        for name, _ in list(block.named_parameters()):
            value = self._owner.read(self.prefix(index) + name)
            assert value is not None
            _put(block, name, _frozen(value))
        return block

    def unload(self, index: int) -> None:
        """Give a block's memory back."""
        for name, parameter in list(self.blocks[index].named_parameters()):
            _put(self.blocks[index], name, _frozen(torch.empty_like(parameter, device="meta")))


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, parameter)


def _frozen(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


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
