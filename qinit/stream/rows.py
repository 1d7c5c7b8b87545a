"""A row of blocks, of which one at a time has its weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import nn

from qinit.stream.calls import Arguments, Call, NotStreamable, Stop

BARE = -1  # of what a block returns beside its hidden states: these alone, and in no tuple or list
Ends = Sequence[torch.Tensor | None]  # what the rows before a row have come to; None: never reached


@dataclass(frozen=True)
class Start:
    """Where a row of blocks starts: the `hidden` states in front of its first block, how each block is called, and what
    the calls' slots stand for (`made`); all three carry the gradient of what the rows before have come to."""

    hidden: torch.Tensor
    calls: list[Call]
    made: list[torch.Tensor]


class Owner(Protocol):
    """The model that a row is a part of."""

    rows: tuple[Row, ...]

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> torch.Tensor | None: ...

    def announce(self, prefix: str) -> None: ...

    def run(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> Any: ...


class _StandIn(nn.Module):
    """Has a block's place and its attributes, but not its weights."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.__dict__["real"] = real  # not a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)  # such as attention_type, which some models ask a block for


class _Through(_StandIn):
    """Returns the same whatever it is given: the hidden states, with nothing in the places of what else it returns."""

    def __init__(self, real: nn.Module, hidden: torch.Tensor, others: int) -> None:
        super().__init__(real)
        self.__dict__["output"] = hidden if others == BARE else (hidden, *[None] * others)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.__dict__["output"]


class _Wall(_StandIn):
    """A block of a row whose turn has not come."""

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        raise Stop


class _Kept:
    """The arguments of a row's blocks as they are called, and what the first one gives the others to hand on."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.arguments: list[Arguments] = []
        self.others: list[Any] | None = None  # None: it gives its hidden states alone, in no tuple or list
        self.moving: list[torch.Tensor] = []  # of these, what depends on the hidden states

    def add(self, arguments: Arguments) -> None:
        if any(value is one for one in self.moving for value in (*arguments[0], *arguments[1].values())):
            raise NotStreamable("its blocks hand on more than their hidden states")
        self.arguments.append(arguments)
        if len(self.arguments) == self.count:
            raise Stop

    def output(self) -> Any:
        first = _hidden(self.arguments[0])
        return first if self.others is None else (first, *self.others)


class _Stub(_StandIn):
    """Keeps a block's arguments and returns the first block's hidden states."""

    def __init__(self, real: nn.Module, kept: _Kept) -> None:
        super().__init__(real)
        self.kept = kept

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.kept.add((args, kwargs))
        return self.kept.output()


class _First(_Stub):
    """Is run too, to see what else it returns: T5's first block makes the position bias of all others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.kept.arguments.append((args, kwargs))
        hidden = _hidden((args, kwargs)).detach().requires_grad_()
        with torch.enable_grad():
            real = self.__dict__["real"]
            output = real(hidden, *args[1:], **kwargs) if args else real(**{**kwargs, "hidden_states": hidden})
        if isinstance(output, tuple | list):
            others = list(output[1:])
            depend = [isinstance(value, torch.Tensor) and value.requires_grad for value in others]
            self.kept.others = [value.detach() if moves else value for value, moves in zip(others, depend, strict=True)]
            self.kept.moving = [value for value, moves in zip(self.kept.others, depend, strict=True) if moves]
        if self.kept.count == 1:
            raise Stop
        return self.kept.output()


def _hidden(arguments: Arguments) -> torch.Tensor:
    args, kwargs = arguments
    return args[0] if args else kwargs["hidden_states"]


class Row:
    """A row of blocks, each of which takes what the one before it gives."""

    def __init__(self, model: Owner, path: str, blocks: nn.ModuleList) -> None:
        self._owner, self.path, self.blocks = model, path, blocks
        self.others: int | None = None  # what a block returns beside its hidden states; None: not looked at yet

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
            if not self._owner.has(f"{self.path}.{name}"):
                raise NotStreamable(f"the checkpoint has no tensor {self.path}.{name}")

    def start(self, tokens: torch.Tensor, mask: torch.Tensor | None, ends: Ends = ()) -> Start | None:
        """Run a batch as far as the blocks, given what the rows before have come to (`ends`: the hidden states behind
        each); None if the model never calls them for it. Raises NotStreamable."""
        if self.others is None:
            try:
                return self._start(tokens, mask, ends, _Stub)
            except NotStreamable:
                self.others = BARE  # perhaps they return more than hidden states
        if any(parameter.is_meta for parameter in self.blocks[0].parameters()):
            self.load(0)
        return self._start(tokens, mask, ends, _First)

    def _start(self, tokens: torch.Tensor, mask: torch.Tensor | None, ends: Ends, first: type[_Stub]) -> Start | None:
        kept = _Kept(len(self))

        def stand_in(index: int, block: nn.Module) -> nn.Module:
            return (_Stub if index else first)(block, kept)

        try:
            with ExitStack() as places:
                for row, end in zip_longest(self._owner.rows, ends):
                    places.enter_context(row.giving(end))
                places.enter_context(self._replaced(stand_in))
                if ends:
                    places.enter_context(torch.enable_grad())
                self._owner.run(tokens, mask)
        except Stop:
            pass
        except NotStreamable:
            raise
        except Exception as error:  # a model can do anything between its blocks
            raise NotStreamable(f"the model does not run without its blocks ({error})") from error
        if not kept.arguments:
            return None
        if len(kept.arguments) != len(self):
            raise NotStreamable(f"{len(kept.arguments)} of {len(self)} blocks were called")
        hidden = _hidden(kept.arguments[0])
        if hidden.shape[:-1] != tokens.shape:
            raise NotStreamable(f"the blocks take hidden states of shape {list(hidden.shape)}")
        if any(_hidden(arguments).shape != hidden.shape for arguments in kept.arguments):
            raise NotStreamable("its blocks take hidden states of several shapes")
        if first is _First:
            self.others = BARE if kept.others is None else len(kept.others)
        made: list[torch.Tensor] = []
        return Start(hidden, [Call(*arguments).parted(made) for arguments in kept.arguments], made)

    def giving(self, end: torch.Tensor | None) -> AbstractContextManager[None]:
        """Have all blocks give the same hidden states; None: stop the model that calls one."""
        if end is None:
            return self._replaced(lambda _, block: _Wall(block))
        return self._replaced(lambda _, block: _Through(block, end, BARE if self.others is None else self.others))

    @contextmanager
    def _replaced(self, stand_in: Callable[[int, nn.Module], nn.Module]) -> Iterator[None]:
        current = list(self.blocks)
        for index, block in enumerate(current):
            self.blocks[index] = stand_in(index, block.__dict__.get("real", block))
        try:
            yield
        finally:
            for index, block in enumerate(current):
                self.blocks[index] = block

    def load(self, index: int) -> nn.Module:
        """Return one block with its weights in float32 on the device; the next one is fetched meanwhile."""
        block = self.blocks[index]
        for name, _ in list(block.named_parameters()):
            value = self._owner.read(self.prefix(index) + name)
            assert value is not None
            put(block, name, frozen(value))
        if index + 1 < len(self):
            self._owner.announce(self.prefix(index + 1))
        return block

    def unload(self, index: int) -> None:
        """Give a block's memory back."""
        clear(self.blocks[index])


def put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter by its dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, parameter)


def clear(root: nn.Module, needed: Collection[str] = ()) -> None:
    """Give the memory of all parameters back but that of those `needed`, by their dotted names."""
    for name, parameter in list(root.named_parameters()):
        if name not in needed:
            put(root, name, frozen(torch.empty_like(parameter, device="meta")))


def frozen(value: torch.Tensor) -> nn.Parameter:
    """Return a parameter that gets no gradient."""
    return nn.Parameter(value, requires_grad=False)
