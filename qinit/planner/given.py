"""A base that exists: opened, held against the source by headers, and planned as the layers that it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qinit.errors import CheckpointError, RecipeError, TargetError
from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.formats import FORMATS, READERS, Reader, format_of, method_of
from qinit.formats.unpacked import unpacked
from qinit.plan.parts import Given, LayerPlan
from qinit.plan.plan import Plan
from qinit.recipe import Recipe
from qinit.solver.methods import STARTS
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import Architecture, Target, read_architecture
from qinit.stream.weights import ModelWeights

LOOKED_AT = 1024  # of a layer's values, to see whether a base that packs nothing is rounded at all
KEPT = "the base has not quantized it"


def open_given(recipe: Recipe, directory: Path, source: Path, architecture: Architecture) -> Given:
    """Open a base. Raises CheckpointError for a form that is not read, which it names, and for a base of another model
    than the one in `source` that has this architecture."""
    checkpoint = Checkpoint.open(directory, quantized=True)
    reader = _reader(checkpoint)
    if recipe.adapter != "lora" and (problem := reader.cannot_adapt(recipe.adapter)) is not None:
        raise RecipeError(f"method: {problem}; take --method lora, or another base")
    found = read_architecture(checkpoint, recipe.trust_remote_code)
    _require_same_model(directory, source, architecture, found)
    return Given(checkpoint, found, reader.name)


def open_source(recipe: Recipe, directory: Path, base: Path | None) -> tuple[Checkpoint, Architecture]:
    """Open what a run starts from. A base that is there and is its own source may be quantized: it is seen unpacked.
    Raises CheckpointError."""
    checkpoint = Checkpoint.open(directory, quantized=base == directory and recipe.method in STARTS)
    architecture = read_architecture(checkpoint, recipe.trust_remote_code)
    if checkpoint.config.get("quantization_config") is not None:
        checkpoint = unpacked(checkpoint, architecture, _reader(checkpoint))
    return checkpoint, architecture


def _reader(checkpoint: Checkpoint) -> Reader:
    """Return what reads a base. Raises CheckpointError for a form that is not read."""
    reader = format_of(checkpoint.config)
    problem = (
        f"quantized as {method_of(checkpoint.config)}" if reader is None else reader.cannot_read(checkpoint.config)
    )
    if reader is None or problem:
        titles = ", ".join(each.title for each in (*FORMATS.values(), *READERS))
        raise CheckpointError(f"{checkpoint.directory / 'config.json'}: {problem}; read are {titles}")
    return reader


def given_layers(plan: Plan, known: tuple[Target, ...], targets: tuple[Target, ...]) -> tuple[LayerPlan, ...]:
    """Plan the layers of a base that is there: the `targets`, and of all that are `known` the others that it has
    quantized, which get no adapter. Raises CheckpointError for tensors that do not fit, and for a base whose layers are
    all as they are in the source; TargetError for a rank beyond a layer, and where no target is quantized."""
    assert plan.given is not None
    given, recipe = plan.given, plan.recipe
    weights = ModelWeights(given.checkpoint, given.architecture, trust_remote_code=recipe.trust_remote_code)
    packed = weights.packed()
    require_rank(recipe, targets)
    if (head := weights.packed_head) is not None and weights.format is not None and weights.format.head_note:
        raise CheckpointError(f"{given.checkpoint.directory}: {head.name} is quantized, and {weights.format.head_note}")
    layers = []
    chosen = {target.name for target in targets}
    if packed and not plan.on_source and not any(target.module.parameter in packed for target in targets):
        raise TargetError(f"none of the {len(targets)} chosen layers is quantized in the base; choose others")
    for target in known:
        if target.module.expert is not None:
            continue  # as the base has it, which must be as the source has it
        module = target.module
        parts, rank = packed.get(module.parameter), recipe.rank if target.name in chosen else 0
        if parts is None and not rank and (packed or plan.on_source):
            continue  # held against the source's own
        if parts is not None and weights.format is not None:
            bits, group_size = weights.format.grid_of(module, parts, given.checkpoint.config)
            specs = tuple(TensorSpec(part.name, part.dtype, part.shape) for part in parts.values())
            layers.append(LayerPlan(target, bits, group_size, rank, None, specs))
            continue
        stored = weights.names.find(module.parameter)
        if stored is None or stored.shape != target.tensor.shape or not stored.dtype.is_floating_point:
            found = "nothing" if stored is None else f"{stored.dtype} {list(stored.shape)}".removeprefix("torch.")
            raise CheckpointError(
                f"{given.checkpoint.directory}: has {found} for {module.parameter}; expected what config.json says, or "
                f"a plain weight {list(target.tensor.shape)}"
            )
        same = TensorSpec(stored.name, stored.dtype, stored.shape)
        bits = 8 * stored.dtype.itemsize
        kept = KEPT if packed and not plan.on_source else None
        layers.append(LayerPlan(target, bits, module.in_features, rank, kept, (same,)))
    if not packed and recipe.row.start != "none":
        _require_rounded(plan, weights, targets)
    return tuple(layers)


def given_remarks(given: Given) -> list[str]:
    """Say what of a base stays as it is though it is quantized."""
    head = ModelWeights(given.checkpoint, given.architecture).packed_head
    return [] if head is None else [f"{head.name} is quantized in the base, and stays so: output heads get no adapter"]


def require_rank(recipe: Recipe, targets: Sequence[Target]) -> None:
    """Raise TargetError for a rank that the shape of a layer does not allow; LoRA-GA takes twice as many directions of
    the gradient."""
    share = 2 if "gradient" in recipe.row.needs else 1
    for target in targets:
        rank = min(target.module.out_features, target.module.in_features) // share
        if recipe.rank > rank:
            raise TargetError(f"rank: {recipe.rank} is beyond {target.name}, whose shape allows {rank} at most")


def no_base_of(base: Path, source: Path, what: str) -> CheckpointError:
    """Return the error for a base of another model than the source; `what` says by what that is known."""
    return CheckpointError(
        f"{base}: is no base of {source}: {what}; give the model that it was quantized from with --source"
    )


def _require_same_model(directory: Path, source: Path, expected: Architecture, found: Architecture) -> None:
    if found.class_name != expected.class_name:
        raise no_base_of(directory, source, f"it is a {found.class_name}, and the source a {expected.class_name}")
    shapes = [
        {module.name: (module.out_features, module.in_features) for module in a.linear} for a in (expected, found)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        here, there = (shape.get(name) for shape in shapes)
        if here != there:
            raise no_base_of(
                directory, source, f"{name} is {there or 'not there'}, and in the source {here or 'not there'}"
            )


def _require_rounded(plan: Plan, weights: ModelWeights, targets: tuple[Target, ...]) -> None:
    """Raise CheckpointError where a base that packs nothing has the source's own values in every layer."""
    for target in targets:
        stored = weights.names.find(target.module.parameter)
        if stored is not None and not torch.allclose(_first(stored), _first(target.tensor), rtol=1e-2, atol=1e-6):
            return
    assert plan.given is not None
    raise CheckpointError(
        f"{plan.given.checkpoint.directory}: is not quantized: it has the source's own weights, so there is nothing to "
        "repair; for an adapter to start from on it give --method and no --source"
    )


def _first(tensor: StoredTensor) -> torch.Tensor:
    raw = bytearray(tensor.first_bytes(LOOKED_AT * tensor.dtype.itemsize))
    return torch.frombuffer(raw, dtype=tensor.dtype).float()
