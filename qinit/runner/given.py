"""A base that exists, held against the model that it is said to be made from while it is read."""

from __future__ import annotations

import torch

from qinit.errors import CheckpointError
from qinit.files.tensors import CHUNK_BYTES, StoredTensor
from qinit.formats import format_of
from qinit.formats.reader import Reader
from qinit.linalg.chunks import row_chunks
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.planner.given import no_base_of
from qinit.source.checkpoint import Checkpoint
from qinit.stream.weights import ModelWeights
from qinit.workplace.store import Store

SAME = 1e-2  # of its own norm a tensor may differ by: another 16-bit type moves it by a third of that at most
ALIKE = 0.3  # the least cosine of Q and W: 2 bits have 0.8 and more, other weights 0


def read_given(store: Store, layer: LayerPlan, weight: torch.Tensor) -> torch.Tensor | None:
    """Return Q [out, in] of a layer of a base that is there, on the device of its `weight` W; None where none is there,
    W where the base is its own source.
    Raises CheckpointError for a Q that has nothing to do with W."""
    if store.plan.on_source:
        return weight
    given = store.given(layer)
    if given is None:
        return None
    given = given.to(weight.device)
    _require_alike(store.plan, layer.target.name, given, weight)
    return given


def _require_alike(plan: Plan, name: str, given: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise CheckpointError for a Q that has nothing to do with W; both are [out, in], on one device."""
    both = sum(
        float((given[rows].double() * weight[rows]).sum()) for rows in row_chunks(*weight.shape, device=weight.device)
    )
    norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in (given, weight)]
    sizes = float(norms[0] * norms[1])
    if sizes and both < ALIKE * sizes:
        raise _another(plan, f"the cosine of {name} in the two is {both / sizes:.2f}")


def base_weights(plan: Plan) -> ModelWeights:
    """Return what reads the base of a plan that has one."""
    assert plan.given is not None
    given, trusted = plan.given, plan.recipe.trust_remote_code
    return ModelWeights(given.checkpoint, given.architecture, trust_remote_code=trusted)


def require_same_rest(plan: Plan) -> None:
    """Raise CheckpointError where the base has other values than the source in what neither quantizes: an adapter does
    not repair that. A head that the base has quantized is whole in memory, of all else one piece of a tensor at a
    time."""
    assert plan.given is not None
    base, head = plan.given.checkpoint, base_weights(plan).packed_head
    stacks = {stack.name for stack in plan.architecture.stacks}
    source_names, base_names = plan.architecture.names_in(plan.checkpoint), plan.given.architecture.names_in(base)
    for tensor in plan.untouched:
        parameter = source_names.parameter_of.get(tensor.name)
        if head is not None and parameter == head.parameter:
            given = base_weights(plan).read(parameter, torch.device("cpu"))
            assert given is not None
            _require_alike(plan, head.name, given, tensor.read())
            continue
        if parameter in stacks and (reader := _packed_as(base, tensor.name)) is not None:
            raise CheckpointError(
                f"{base.directory}: '{tensor.name}' is quantized, and experts are not read from {reader.title}: "
                f"{reader.packed_experts_note}"
            )
        other = None if parameter is None else base_names.find(parameter) or base.tensors.get(tensor.name)
        if parameter is None or other is None:
            if parameter in stacks:
                raise CheckpointError(
                    f"{base.directory}: has no '{tensor.name}': experts that are stored in another way than the "
                    "source's are not repaired"
                )
            stem = "" if parameter is None else parameter.rpartition(".")[0]
            packed = next((name for name in base.tensors if stem and name.startswith(f"{stem}.")), None)
            if packed is not None:
                raise CheckpointError(
                    f"{base.directory}: has '{packed}' in the place of {parameter}, which is no linear layer: a "
                    "quantized embedding is not repaired"
                )
            continue
        if other.shape != tensor.shape:
            raise _another(plan, f"{parameter} is {list(other.shape)} there and {list(tensor.shape)} here")
        if (distance := apart(tensor, other)) > SAME:
            raise CheckpointError(
                f"{base.directory}: its {parameter} is not the source's ({100 * distance:.1f} % away): it belongs to "
                "another model"
            )


def _packed_as(base: Checkpoint, name: str) -> Reader | None:
    """Return what reads the parts that a base has in the place of a tensor of that name, None where it has none."""
    reader, stem = format_of(base.config), name.removesuffix("weight")
    there = reader is not None and reader.parts and all(stem + part in base.tensors for part in reader.parts)
    return reader if there else None


def apart(tensor: StoredTensor, other: StoredTensor) -> float:
    """Return the norm of the difference of two tensors of one shape, relative to the first."""
    count = CHUNK_BYTES // 8
    pairs = zip(tensor.chunks(count * tensor.dtype.itemsize), other.chunks(count * other.dtype.itemsize), strict=True)
    difference = size = 0.0
    for a, b in pairs:
        x, y = a.view(tensor.dtype).double(), b.view(other.dtype).double()
        difference += float((x - y).square().sum())
        size += float(x.square().sum())
    return (difference / size) ** 0.5 if size else float(difference > 0)


def _another(plan: Plan, what: str) -> CheckpointError:
    assert plan.given is not None
    return no_base_of(plan.given.checkpoint.directory, plan.checkpoint.directory, what)
