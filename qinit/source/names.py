"""Which of a checkpoint's tensors become which of a model's parameters: as transformers' own loader has it, with the
conversions that it knows for a model (`transformers.conversion_mapping`), and the base model's prefix put on or off."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from qinit.files.tensors import StoredTensor

Read = Callable[[StoredTensor], torch.Tensor]
Rename = Callable[[str], tuple[str, str | None]]  # a checkpoint's name -> the loader's, and what of a converter it fits


@dataclass
class Made:
    """Parameters that the loader makes of tensors: the name of the first of them, transformers' converter, and the
    tensors by the converter's patterns, in the loader's order."""

    first: str
    converter: Any
    tensors: dict[str, list[StoredTensor]] = field(default_factory=dict)

    def convert(self, model: Any, read: Read) -> dict[str, torch.Tensor]:
        """Return the parameters by name, made of what `read` gives for each tensor."""
        converter = copy.deepcopy(self.converter)
        for pattern, tensors in self.tensors.items():
            converter.collected_tensors[pattern] = [partial(read, tensor) for tensor in tensors]
        found = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


class Naming:
    """How the loader names what is stored for a model, given as its skeleton on the meta device."""

    def __init__(self, model: Any) -> None:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        self.model = model
        self.parameters = frozenset(model.state_dict())
        self.linear = frozenset(name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)))
        self._last: Names | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process is given: what has been found out is found out anew there."""
        return {**self.__dict__, "_last": None}

    def get(self, name: str) -> bool | None:
        """Return True for the name of a parameter, or of a part of a packed layer, None for any other. Such a part may
        have dots in its own name, as bitsandbytes' `weight.absmax`."""
        stem = name.rpartition(".weight.")[0] or name.rpartition(".")[0]
        return True if name in self.parameters or stem in self.linear else None

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def names_in(self, tensors: Mapping[str, StoredTensor]) -> Names:
        """Find out what becomes of each of a checkpoint's tensors; of the same ones once."""
        if self._last is None or self._last.tensors is not tensors:
            self._last = Names(self, tensors)
        return self._last


class Names:
    """What becomes of a checkpoint's tensors. Of several tensors for one parameter the loader takes the first."""

    def __init__(self, naming: Naming, tensors: Mapping[str, StoredTensor]) -> None:
        self.naming, self.tensors = naming, tensors
        self._rename, order, converters = _loader(naming)
        self._stored: dict[str, StoredTensor] = {}
        self._made: dict[str, Made] = {}
        self.parameter_of: dict[str, str] = {}  # by a tensor's name; the first parameter where it goes into several
        for name in sorted(tensors, key=order):
            parameter, pattern = self._rename(name)
            if parameter not in naming:
                continue
            self.parameter_of[name] = parameter
            if pattern is None:
                self._stored.setdefault(parameter, tensors[name])
            else:
                made = self._made.setdefault(parameter, Made(parameter, converters[pattern]))
                made.tensors.setdefault(pattern, []).append(tensors[name])
        for made in list(self._made.values()):
            if len(made.converter.target_patterns) > 1 or "*" in made.converter.target_patterns[0]:
                with _unfit():
                    self._made |= dict.fromkeys(made.convert(naming.model, _on_meta), made)

    def find(self, parameter: str) -> StoredTensor | None:
        """Return the tensor that is the parameter as it stands, None if there is none."""
        return self._stored.get(parameter)

    def parts_of(self, parameter: str) -> list[StoredTensor]:
        """Return the tensors that become a parameter: the one that it is, or those that the loader makes it of."""
        if parameter in self._stored:
            return [self._stored[parameter]]
        made = self._made.get(parameter)
        return [] if made is None else [tensor for tensors in made.tensors.values() for tensor in tensors]

    def made_of(self, parameter: str) -> list[str]:
        """Return the names of the tensors that the loader makes a parameter of, where no single one is it."""
        return [] if parameter in self._stored else [tensor.name for tensor in self.parts_of(parameter)]

    def make(self, parameter: str, read: Read) -> torch.Tensor | None:
        """Make a parameter of its tensors, in the dtype that `read` gives them; None where one tensor or none is it."""
        made = self._made.get(parameter) if self.made_of(parameter) else None
        return None if made is None else made.convert(self.naming.model, read).get(parameter)

    def prefix(self, module: str, parts: Sequence[str] = ()) -> str:
        """Return what a checkpoint calls a module, with a dot at its end: by its weight, or by the `parts` of a packed
        one; the module's own name where there is none."""
        for part in ("weight", *parts):
            tensor = self.find(f"{module}.{part}")
            if tensor is not None:
                return tensor.name.removesuffix(part)
        return f"{module}."

    def arrives(self, name: str, parameter: str) -> bool:
        """Whether the loader would take a tensor of that name for the parameter, as it stands."""
        return self._rename(name) == (parameter, None)


def _loader(naming: Naming) -> tuple[Rename, Callable[[str], Any], dict[str, Any]]:
    """Return how the loader renames what a checkpoint holds, the order in which it does so, as some renamings depend on
    what came before, and its converters by pattern."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # transformers 4
        return partial(_rename_plainly, naming), str, {}
    model = naming.model
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix

    def rename(name: str) -> tuple[str, str | None]:
        found = rename_source_key(name, renamings, converters, prefix, naming)  # type: ignore[arg-type]
        if found[0] not in naming and name in naming:
            return rename_source_key(name, [], [], prefix, naming)  # type: ignore[arg-type]
        return found

    return rename, dot_natural_key, {pattern: each for each in converters for pattern in each.source_patterns}


def _rename_plainly(naming: Naming, name: str) -> tuple[str, None]:
    """Do what transformers 4 does: the first pattern of the class that fits, then the base model's prefix."""
    for pattern, replacement in (getattr(naming.model, "_checkpoint_conversion_mapping", None) or {}).items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    prefix = f"{naming.model.base_model_prefix}."
    for found in (name, prefix + name, name.removeprefix(prefix)):
        if found in naming:
            return found, None
    return name, None


def _on_meta(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


@contextmanager
def _unfit() -> Iterator[None]:
    """Leave a converter out that tensors of these shapes do not fit: whoever reads what it makes gets the error."""
    try:
        yield
    except Exception:  # a converter can do anything
        return
