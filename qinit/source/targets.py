"""Which modules to quantize: taken from the architecture, then matched to the checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from qinit.errors import CheckpointError, TargetError, did_you_mean
from qinit.files.tensors import StoredTensor
from qinit.source.checkpoint import Checkpoint
from qinit.source.language import language_part
from qinit.source.modules import is_plain, set_by_parents
from qinit.source.names import Names, Naming
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
    """The model's linear modules in order, its class, its embeddings' shapes, the classes of all its modules by their
    names, and what its forward calls its main input.

    `language` is the name of the module that reads text where others see or hear beside it, "" where there is no such
    part. `naming` says what its loader makes of a checkpoint's names.
    """

    class_name: str
    linear: tuple[LinearModule, ...]
    embeddings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    modules: dict[str, type] = field(default_factory=dict)
    main_input: str = "input_ids"
    language: str = ""
    naming: Naming | None = None

    def names_in(self, checkpoint: Checkpoint) -> Names:
        """Return which of a checkpoint's tensors become which of the model's parameters."""
        assert self.naming is not None
        return self.naming.names_in(checkpoint.tensors)

    def in_language(self, module: str) -> bool:
        """Whether a module is part of what reads text: any is, where no others see or hear."""
        return not self.language or module.startswith(f"{self.language}.")


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
    return Architecture(
        type(model).__name__,
        tuple(linear),
        shapes,
        {name: type(module) for name, module in modules.items()},
        getattr(model, "main_input_name", "input_ids"),
        language_part(model),
        Naming(model),
    )


def _require_shape(names: Names, parameter: str, expected: tuple[int, ...]) -> None:
    """Raise CheckpointError if the checkpoint has the parameter in another shape."""
    tensor = names.find(parameter)
    if tensor is not None and tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.file}: tensor '{tensor.name}' has shape {list(tensor.shape)}, config.json says "
            f"{list(expected)}; config and weights belong to different models"
        )


def resolve_targets(checkpoint: Checkpoint, architecture: Architecture) -> tuple[Target, ...]:
    """Match every linear module to its tensor, by the names that the loader makes of the checkpoint's. A module whose
    weight the loader makes of other tensors is left out.

    Raises CheckpointError when a weight is missing or has another shape than the architecture says, embeddings too.
    """
    names = architecture.names_in(checkpoint)
    for name, shape in architecture.embeddings.items():
        _require_shape(names, name, shape)
    targets = []
    for module in architecture.linear:
        parameter = f"{module.name}.weight"
        tensor = names.find(parameter)
        if tensor is None:
            if names.made_of(parameter):
                continue
            raise _no_weight(checkpoint, architecture, module)
        expected = (module.out_features, module.in_features)
        if module.transposed:
            expected = expected[::-1]
        _require_shape(names, parameter, expected)
        if not tensor.numel:
            raise CheckpointError(f"{tensor.file}: tensor '{tensor.name}' of shape {list(tensor.shape)} is empty")
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize not in (2, 4):
            raise CheckpointError(
                f"{tensor.file}: tensor '{tensor.name}' is {tensor.dtype}; qinit reads float32, float16 and bfloat16"
            )
        targets.append(Target(module, tensor))
    return tuple(targets)


def _no_weight(checkpoint: Checkpoint, architecture: Architecture, module: LinearModule) -> CheckpointError:
    import transformers

    return CheckpointError(
        f"{checkpoint.directory}: no weight for module '{module.name}' of {architecture.class_name}: transformers "
        f"{transformers.__version__} makes '{module.name}.weight' of none of the checkpoint's names, and would start "
        "it at random; is config.json that of another model, or for another version of transformers?"
    )


def select(
    targets: Iterable[Target],
    wanted: str,
    exclude: str | None = None,
    is_default: Callable[[str], bool] = lambda module: True,
) -> tuple[Target, ...]:
    """Choose targets: `all-linear`, which is all that are `is_default` by their names, comma-separated name endings
    (`q_proj,mlp.down_proj`), or a regular expression that matches a whole module name; the same forms exclude.

    Raises TargetError, listing what there is, when a part of the choice matches nothing.
    """
    targets = tuple(targets)
    default = tuple(target for target in targets if is_default(target.name))
    chosen = default if wanted == ALL_LINEAR else _matching(targets, wanted, "--target-modules")
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
