"""Which modules to quantize: taken from the architecture, then matched to the checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qinit.errors import CheckpointError, TargetError, did_you_mean
from qinit.files.tensors import StoredTensor
from qinit.source.checkpoint import Checkpoint
from qinit.source.modules import is_plain, set_by_parents
from qinit.source.skeleton import build_model

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LinearModule:
    """A linear module of the architecture: W is [out_features, in_features]; Conv1D stores W transposed.

    `set_by_parent`: the weight is initialized by an enclosing module, as GPT-2's c_proj is. `plain`: its forward is
    W x + b and nothing else. `subclass`: its class's name where that is a subclass of nn.Linear.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool
    set_by_parent: bool = False
    plain: bool = True
    subclass: str = ""


@dataclass(frozen=True)
class Target:
    """A linear module and the tensor that holds its weight."""

    module: LinearModule
    tensor: StoredTensor

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def prefix(self) -> str:
        """The tensor name without `weight`: what a packed format's names start with."""
        return self.tensor.name.removesuffix("weight")


@dataclass(frozen=True)
class Architecture:
    """The model's linear modules in order, its base-model prefix, its class, its embeddings' shapes, the classes of all
    its modules by their names, and what its forward calls its main input."""

    class_name: str
    base_prefix: str
    linear: tuple[LinearModule, ...]
    embeddings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    modules: dict[str, type] = field(default_factory=dict)
    main_input: str = "input_ids"


def read_architecture(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Architecture:
    """Build the model on the meta device (no memory, no weights) and list its linear modules.

    Output heads and modules whose weight is tied to an embedding are left out. Raises CheckpointError as `build_model`
    does.
    """
    # Without buffers they would be allocated, then dropped.
    model = build_model(checkpoint, include_buffers=True, trust_remote_code=trust_remote_code)
    return architecture_of(model)


def architecture_of(model: Any) -> Architecture:
    """List the linear modules of a model on the meta device, as `read_architecture` does."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if name}
    tables = {name: module.weight for name, module in modules.items() if isinstance(module, nn.Embedding)}
    embeddings = {id(weight) for weight in tables.values()}
    found = {
        name: module
        for name, module in modules.items()
        if module is not head and isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in embeddings
    }
    set_by_parent = set_by_parents(model, found)
    linear = []
    for name, module in found.items():
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        subclass = type(module).__name__ if isinstance(module, nn.Linear) and type(module) is not nn.Linear else ""
        by_parent, plain = name in set_by_parent, is_plain(module)
        linear.append(LinearModule(name, out_features, in_features, transposed, by_parent, plain, subclass))
    shapes = {f"{name}.weight": tuple(weight.shape) for name, weight in tables.items()}
    classes = {name: type(module) for name, module in modules.items()}
    main_input = getattr(model, "main_input_name", "input_ids")
    return Architecture(type(model).__name__, model.base_model_prefix, tuple(linear), shapes, classes, main_input)


def _require_shape(checkpoint: Checkpoint, parameter: str, expected: tuple[int, ...], base_prefix: str) -> None:
    """Raise CheckpointError if the checkpoint has the parameter in another shape."""
    tensor = find_tensor(checkpoint, parameter, base_prefix)
    if tensor is not None and tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.file}: tensor '{tensor.name}' has shape {list(tensor.shape)}, config.json says "
            f"{list(expected)}; config and weights belong to different models"
        )


def find_tensor(checkpoint: Checkpoint, parameter: str, base_prefix: str) -> StoredTensor | None:
    """Return what the checkpoint has for a parameter, None if it has nothing."""
    names = possible_names(parameter, base_prefix)
    return next((checkpoint.tensors[name] for name in names if name in checkpoint.tensors), None)


def resolve_targets(checkpoint: Checkpoint, architecture: Architecture) -> tuple[Target, ...]:
    """Match every linear module to its tensor, with or without the base-model prefix.

    Raises CheckpointError when a weight is missing or has another shape than the architecture says, embeddings too.
    """
    for name, shape in architecture.embeddings.items():
        _require_shape(checkpoint, name, shape, architecture.base_prefix)
    targets = []
    for module in architecture.linear:
        parameter = f"{module.name}.weight"
        tensor = find_tensor(checkpoint, parameter, architecture.base_prefix)
        if tensor is None:
            names = possible_names(parameter, architecture.base_prefix)
            raise CheckpointError(
                f"{checkpoint.directory}: no weight for module '{module.name}' of {architecture.class_name} "
                f"(looked for {', '.join(names)})"
            )
        expected = (module.out_features, module.in_features)
        if module.transposed:
            expected = expected[::-1]
        _require_shape(checkpoint, parameter, expected, architecture.base_prefix)
        if not tensor.numel:
            raise CheckpointError(f"{tensor.file}: tensor '{tensor.name}' of shape {list(tensor.shape)} is empty")
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize not in (2, 4):
            raise CheckpointError(
                f"{tensor.file}: tensor '{tensor.name}' is {tensor.dtype}; qinit reads float32, float16 and bfloat16"
            )
        targets.append(Target(module, tensor))
    return tuple(targets)


def possible_names(parameter: str, base_prefix: str) -> list[str]:
    """Return the names that a checkpoint may give a parameter: with or without the base-model prefix."""
    prefix = base_prefix + "."
    names = [parameter, prefix + parameter]
    if parameter.startswith(prefix):
        names.append(parameter.removeprefix(prefix))
    return names


def select(targets: Iterable[Target], wanted: str, exclude: str | None = None) -> tuple[Target, ...]:
    """Choose targets: `all-linear`, comma-separated name endings (`q_proj,mlp.down_proj`), or a regular
    expression that matches a whole module name; the same forms exclude.

    Raises TargetError, listing what there is, when a part of the choice matches nothing.
    """
    targets = tuple(targets)
    chosen = targets if wanted == ALL_LINEAR else _matching(targets, wanted, "--target-modules")
    if exclude:
        dropped = {target.name for target in _matching(targets, exclude, "--exclude")}
        chosen = tuple(target for target in chosen if target.name not in dropped)
    if not chosen:
        raise TargetError(f"no linear module is left to quantize; the model has {_kinds(targets)}")
    return chosen


def _matching(targets: tuple[Target, ...], pattern: str, option: str) -> tuple[Target, ...]:
    if re.fullmatch(r"[\w.,\- ]+", pattern):
        matched: set[str] = set()
        for ending in filter(None, (part.strip() for part in pattern.split(","))):
            names = {t.name for t in targets if t.name == ending or t.name.endswith("." + ending)}
            if not names:
                kinds = {t.name.rsplit(".", 1)[-1] for t in targets}
                raise TargetError(
                    f"{option}: no linear module is named '{ending}'{did_you_mean(ending, kinds)}; "
                    f"the model has {_kinds(targets)}"
                )
            matched |= names
        return tuple(t for t in targets if t.name in matched)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{option}: '{pattern}' is no valid regular expression ({error})") from None
    found = tuple(t for t in targets if expression.fullmatch(t.name))
    if not found:
        raise TargetError(
            f"{option}: '{pattern}' matches no whole module name (one is '{targets[0].name}'); "
            f"the model has {_kinds(targets)}"
        )
    return found


def _kinds(targets: tuple[Target, ...]) -> str:
    counts: dict[str, int] = {}
    for target in targets:
        kind = target.name.rsplit(".", 1)[-1]
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} ({count}x)" for kind, count in counts.items()) or "no linear modules"
