"""Which modules to quantize: taken from the architecture, then matched to the checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qinit.errors import CheckpointError, TargetError, did_you_mean
from qinit.files.tensors import StoredTensor
from qinit.source.checkpoint import Checkpoint
from qinit.source.experts import Stack, read_stacks
from qinit.source.language import language_part
from qinit.source.modules import is_plain, set_by_parents
from qinit.source.names import Names, Naming
from qinit.source.skeleton import build_model

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Expert:
    """Which of the `count` slices of a 3-D parameter an expert's matrix is. `behind` counts the other such parameters
    that their module has behind this one; `told`: the module says itself that slices are [in, out]."""

    index: int
    count: int
    behind: int
    told: bool


@dataclass(frozen=True)
class LinearModule:
    """A linear module of the architecture: W is [out_features, in_features]; Conv1D stores W transposed.

    `set_by_parent`: the weight is initialized by an enclosing module, as GPT-2's c_proj is. `plain`: its forward is
    W x + b and nothing else. `subclass`: its class's name where that is a subclass of nn.Linear. `expert`: it is no
    module but a slice of a 3-D parameter, and the name is PARAMETER[i].
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool
    set_by_parent: bool = False
    plain: bool = True
    subclass: str = ""
    expert: Expert | None = None

    @property
    def parameter(self) -> str:
        """The name of the model's parameter that holds W, or that W is a slice of."""
        return f"{self.name}.weight" if self.expert is None else self.name.rpartition("[")[0]


@dataclass(frozen=True)
class Target:
    """A linear module and the tensor that holds its weight; an expert's may lie in several, one after the other along
    its outputs: `more` are those behind the first."""

    module: LinearModule
    tensor: StoredTensor
    more: tuple[StoredTensor, ...] = ()

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All tensors that hold the weight."""
        return (self.tensor, *self.more)

    @property
    def outputs_side(self) -> int:
        """The dimension of the tensors that counts outputs, along which they follow one another."""
        return 1 if self.module.transposed else 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def prefix(self) -> str:
        """The tensor name without `weight`: what a packed format's names start with."""
        return self.tensor.name.removesuffix("weight")


@dataclass(frozen=True)
class Architecture:
    """The model's linear modules in order, its class, its embeddings' shapes, the classes of all its modules by their
    names, what its forward calls its main input, its output head where that is a linear module, its stacked experts,
    and the names of the linear modules that choose among experts.

    `language` is the name of the module that reads text where others see or hear beside it, "" where there is no such
    part. `naming` says what its loader makes of a checkpoint's names.
    """

    class_name: str
    linear: tuple[LinearModule, ...]
    embeddings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    classes: dict[str, type] = field(default_factory=dict)
    main_input: str = "input_ids"
    language: str = ""
    naming: Naming | None = None
    head: LinearModule | None = None
    stacks: tuple[Stack, ...] = ()
    routers: frozenset[str] = frozenset()

    def names_in(self, checkpoint: Checkpoint) -> Names:
        """Return which of a checkpoint's tensors become which of the model's parameters."""
        assert self.naming is not None
        return self.naming.names_in(checkpoint.tensors)

    def in_language(self, module: str) -> bool:
        """Whether a module is part of what reads text: any is, where no others see or hear."""
        return not self.language or module.startswith(f"{self.language}.")

    @cached_property
    def modules(self) -> dict[str, LinearModule]:
        """Linear modules and experts that can be quantized, by name, in the model's order."""
        found: list[tuple[int, LinearModule]] = [(2 * place + 1, module) for place, module in enumerate(self.linear)]
        known = [stack for stack in self.stacks if stack.sources]
        for number, stack in enumerate(known):
            behind = sum(other.module == stack.module for other in known[number + 1 :])
            shape = stack.out_features, stack.in_features, stack.transposed
            for index, name in enumerate(stack.slice_names()):
                expert = Expert(index, stack.count, behind, stack.told)
                found.append((2 * stack.place, LinearModule(name, *shape, expert=expert)))
        return {module.name: module for _, module in sorted(found, key=lambda pair: pair[0])}


def read_architecture(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Architecture:
    """Build the model on the meta device (no memory, no weights) and list its linear modules.

    Output heads and modules whose weight is tied to an embedding are left out. Raises CheckpointError as `build_model`
    does.
    """
    # Without buffers they would be allocated, then dropped.
    model = build_model(checkpoint, include_buffers=True, trust_remote_code=trust_remote_code)
    return architecture_of(model, checkpoint)


def architecture_of(model: Any, checkpoint: Checkpoint) -> Architecture:
    """List the linear modules of a checkpoint's model on the meta device, as `read_architecture` does."""
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
    own = {id(module) for module in found.values()}
    naming = Naming(model)
    stacks = read_stacks(model, naming.names_in(checkpoint.tensors), lambda module: id(module) in own)
    return Architecture(
        class_name=type(model).__name__,
        linear=tuple(linear),
        embeddings=shapes,
        classes={name: type(module) for name, module in modules.items()},
        main_input=getattr(model, "main_input_name", "input_ids"),
        language=language_part(model),
        naming=naming,
        head=next((_plain_linear(name, module) for name, module in modules.items() if module is head), None),
        stacks=stacks,
        routers=_routers(linear, stacks),
    )


def _plain_linear(name: str, module: Any) -> LinearModule | None:
    """Return a module that is no target, None for one that is not linear."""
    from torch import nn

    if not isinstance(module, nn.Linear):
        return None
    return LinearModule(name, module.out_features, module.in_features, transposed=False)


def _routers(linear: list[LinearModule], stacks: tuple[Stack, ...]) -> frozenset[str]:
    """Return the linear modules that choose among experts, or weigh them: those beside a stack, each alone in its
    branch of the block, with an output for every expert or with one."""
    found = set()
    for block, experts in {(stack.name.rsplit(".", 2)[0] + ".", stack.count) for stack in stacks}:
        branches: dict[str, list[LinearModule]] = {}
        for module in linear:
            if module.name.startswith(block):
                branches.setdefault(module.name.removeprefix(block).split(".")[0], []).append(module)
        for branch in branches.values():
            if all(module.out_features in (1, experts) for module in branch):
                found |= {module.name for module in branch}
    return frozenset(found)


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


def expert_targets(checkpoint: Checkpoint, architecture: Architecture) -> tuple[Target, ...]:
    """Match every expert's matrix to the tensors, or slices of them, that hold it."""
    return tuple(target for experts in stacked_targets(checkpoint, architecture).values() for target in experts)


def stacked_targets(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, list[Target]]:
    """Return the same by the names of the 3-D parameters, for each all of its slices in order."""
    targets: dict[str, list[Target]] = {}
    for stack in architecture.stacks:
        names = {name for parts in stack.sources for name in parts}
        whole = {name.rpartition("[")[0] for name in names - checkpoint.tensors.keys()}
        stored = {part.name: part for name in whole for part in checkpoint.tensors[name].slices()}
        for name, parts in zip(stack.slice_names(), stack.sources, strict=False):
            first, *more = (stored.get(part) or checkpoint.tensors[part] for part in parts)
            target = Target(architecture.modules[name], first, tuple(more))
            targets.setdefault(stack.name, []).append(target)
    return targets


def quantizable(checkpoint: Checkpoint, architecture: Architecture) -> tuple[Target, ...]:
    """Return all that can be quantized, in the model's order: linear modules that choose no expert, and experts. Raises
    what `resolve_targets` does."""
    found = (*resolve_targets(checkpoint, architecture), *expert_targets(checkpoint, architecture))
    by_name = {target.name: target for target in found}
    return tuple(by_name[name] for name in architecture.modules if name in by_name and name not in architecture.routers)


def select(
    targets: Iterable[Target],
    wanted: str,
    exclude: str | None = None,
    is_default: Callable[[str], bool] = lambda module: True,
) -> tuple[Target, ...]:
    """Choose targets: `all-linear`, which is all that are `is_default` by their names, comma-separated name endings
    (`q_proj,mlp.down_proj`), or a regular expression that matches a whole module name; the same forms exclude.
    Experts, whose names are PARAMETER[i], go by the endings of their parameter and of its module (`experts`,
    `experts.down_proj`) too.

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
            names = {t.name for t in targets if any(f".{n}".endswith(f".{ending}") for n in _names_of(t))}
            if not names:
                kinds = {n.rsplit(".", 1)[-1] for t in targets for n in _names_of(t)}
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


def _names_of(target: Target) -> list[str]:
    """Return what a target may be called: its name; an expert's parameter, and the module of that."""
    if target.module.expert is None:
        return [target.name]
    parameter = target.module.parameter
    return [parameter, parameter.rpartition(".")[0]]


def _kinds(targets: tuple[Target, ...]) -> str:
    counts: dict[str, int] = {}
    for target in targets:
        kind = ".".join(_names_of(target)[0].rsplit(".", 2 if target.module.expert is not None else 1)[1:])
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} ({count}x)" for kind, count in counts.items()) or "no linear modules"
