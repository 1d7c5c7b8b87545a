"""The plan of a run, made from headers alone: every layer, every byte, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qinit.adapters import lora as adapter
from qinit.errors import RecipeError, TargetError
from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.machine import pick_device
from qinit.recipe import Recipe, parse_size
from qinit.solver.methods import METHODS
from qinit.solver.spec import LayerSpec
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import Architecture, Target, read_architecture, resolve_targets, select
from qinit.source.vocabulary import Facts

if TYPE_CHECKING:
    from qinit.sensitivity import Sensitivity

# Float32 weight, residual and one temporary of the same size, codes twice, the source and the packed result.
PEAK_BYTES_PER_WEIGHT = 18
FACTOR_COPIES = 5  # of the polish: the factors, gradients, two moments, the best iterate
LOGITS_COPIES = 4  # of the pass back: logits, log-probabilities, probabilities, the gradient
BATCH_TOKENS, LOGITS_BYTES = 1024, 1 << 28  # of a batch of it, at most, and of its logits
HESSIANS = 4  # H itself, without what the adapter repairs, its Cholesky factor and one temporary


@dataclass(frozen=True)
class LayerPlan:
    """One selected layer: quantized, or kept as it is for a reason (its adapter is then a plain LoRA start)."""

    target: Target
    bits: int
    group_size: int
    rank: int
    kept: str | None
    specs: tuple[TensorSpec, ...]  # what stands in the base for this layer's weight

    @property
    def weights(self) -> int:
        return self.target.tensor.numel

    @property
    def bytes_after(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Allocation:
    """How widths were given to layers. `front`, `chosen` and `uniform` are points of bits per weight and predicted loss
    (nats per token over full precision), the last one for each single width; empty where no loss was measured."""

    how: str
    metric: str
    front: tuple[tuple[float, float], ...] = ()
    chosen: tuple[float, float] | None = None
    uniform: tuple[tuple[float, float], ...] = ()
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will read and write."""

    recipe: Recipe
    model_name: str
    checkpoint: Checkpoint
    architecture: Architecture
    layers: tuple[LayerPlan, ...]
    calibration_reason: str = ""  # why `auto` became what it is
    allocation: Allocation | None = None  # of mixed widths; None too while they are still to be measured

    @cached_property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.kept is None)

    @cached_property
    def copied(self) -> tuple[StoredTensor, ...]:
        """Tensors that go into the base unchanged."""
        replaced = {layer.target.tensor.name for layer in self.quantized}
        return tuple(t for name, t in self.checkpoint.tensors.items() if name not in replaced)

    @cached_property
    def base_specs(self) -> list[TensorSpec]:
        """The base's tensors, in the checkpoint's order."""
        layers = {layer.target.tensor.name: layer for layer in self.quantized}
        specs: list[TensorSpec] = []
        for name, tensor in self.checkpoint.tensors.items():
            specs += layers[name].specs if name in layers else [TensorSpec(name, tensor.dtype, tensor.shape)]
        return specs

    @cached_property
    def adapter_specs(self) -> list[TensorSpec]:
        return [spec for layer in self.layers for spec in adapter.specs(layer.target.module, layer.rank)]

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.recipe.max_shard_size)

    @property
    def bytes_before(self) -> int:
        return self.checkpoint.weight_bytes

    @property
    def base_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.base_specs)

    @property
    def adapter_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.adapter_specs)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight: codes, scales, zeros and group indices counted."""
        stored = sum(layer.bytes_after for layer in self.quantized)
        return 8 * stored / sum(layer.weights for layer in self.quantized)

    @property
    def pending(self) -> bool:
        """Whether the layers' widths are provisional, to be chosen after measuring."""
        return self.recipe.mixed and self.allocation is None

    @property
    def grid_bits_per_weight(self) -> float:
        """Bits per quantized weight that the grid needs; the same as stored, or far less when stored dense."""
        grid = GRIDS[self.recipe.row.grid]
        bits = sum(layer.weights * grid.bits_per_weight(layer.bits, layer.group_size) for layer in self.quantized)
        return bits / sum(layer.weights for layer in self.quantized)

    @cached_property
    def facts(self) -> Facts:
        """What the source's configuration says about the token ids that its model reads."""
        return Facts.read(self.checkpoint.directory, self.checkpoint.config, self.recipe.trust_remote_code)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: layers that are kept, ranks that were lowered."""
        notes = [f"{layer.target.name} stays as it is: {layer.kept}" for layer in self.layers if layer.kept]
        if self.recipe.row.name == "eqft":
            how = f"calibration {self.recipe.calibration}" if self.recipe.calibrated else "no calibration"
            if self.calibration_reason:
                notes.append(f"{how}: {self.calibration_reason}")
        notes += [
            f"{layer.target.name}: rank lowered from {self.recipe.rank} to {layer.rank}, all that its shape allows"
            for layer in self.layers
            if layer.rank == min(layer.target.module.out_features, layer.target.module.in_features) < self.recipe.rank
        ]
        if self.recipe.mixed:
            notes.append(self._storage_note)
        if self.pending:
            notes.append(
                "the widths in this plan are spread evenly for now; the run measures how sensitive each layer is and "
                "then chooses them under the same budget"
            )
        return tuple(notes)

    @property
    def _storage_note(self) -> str:
        if FORMATS[self.recipe.format].mixed_bits:
            return (
                f"format {self.recipe.format}: no stock loader takes packed weights of mixed widths, so Q is stored in "
                "the checkpoint's own type; --format gptq packs it, for qinit.load and GPTQModel.load"
            )
        return (
            f"format {self.recipe.format}: packed with mixed widths; load it with qinit.load(DIR) or GPTQModel.load, "
            "as stock from_pretrained reads one width only"
        )

    def layer_spec(self, layer: LayerPlan) -> LayerSpec:
        """Return what the solver is asked for this layer."""
        storage = FORMATS[self.recipe.format].storage(layer.target)
        method, iterations = self.recipe.row, self.recipe.iterations
        return LayerSpec(method, layer.bits, layer.group_size, layer.rank, iterations, storage)

    def data_free_spec(self, layer: LayerPlan) -> LayerSpec:
        """Return the same for a layer that the calibration text never reaches."""
        row = METHODS["eqft"]
        return replace(self.layer_spec(layer), method=row, iterations=row.iterations)


def make_plan(recipe: Recipe, directory: Path, model_name: str) -> Plan:
    """Open the checkpoint, choose its layers and lay out the output; reads headers and configuration only.

    Raises CheckpointError and TargetError.
    """
    checkpoint = Checkpoint.open(directory)
    architecture = read_architecture(checkpoint, recipe.trust_remote_code)
    targets = select(resolve_targets(checkpoint, architecture), recipe.target_modules, recipe.exclude)
    layers = tuple(_plan_layer(recipe, target) for target in targets)
    plan = Plan(recipe, model_name, checkpoint, architecture, layers)
    if not plan.quantized:
        raise TargetError(
            f"format {recipe.format} can hold none of the {len(layers)} chosen layers "
            f"({plan.notes[0]}); use --format dense"
        )
    plan = _with_calibration(plan)
    if recipe.mixed:
        from qinit.mixed import planned

        plan = planned(plan)
    return plan


def with_choice(plan: Plan, layer: LayerPlan, bits: int, rank: int) -> LayerPlan:
    """Return a quantized layer at another width and rank."""
    specs = tuple(FORMATS[plan.recipe.format].specs(layer.target, bits, layer.group_size))
    return replace(layer, bits=bits, rank=rank, specs=specs)


def _with_calibration(plan: Plan) -> Plan:
    """Decide `auto`, and check what was asked for before anything expensive happens."""
    from qinit.calibration.choice import choose
    from qinit.calibration.sources import check_source

    recipe, checkpoint = plan.recipe, plan.checkpoint
    if recipe.calibration == "auto":
        chosen, reason = choose(plan, pick_device(recipe.device))
        asked = {key: getattr(recipe, key) for key in ("rounding", "act_order", "polish") if getattr(recipe, key)}
        if chosen == "none" and asked:
            raise RecipeError(f"{', '.join(asked)}: needs calibration, and there is none: {reason}")
        recipe = recipe.model_copy(update={"calibration": chosen})
        plan = replace(plan, recipe=recipe, calibration_reason=reason)
    if recipe.calibrated:
        check_source(
            recipe.calibration,
            checkpoint.directory,
            checkpoint.config,
            recipe.text_field,
            trust_remote_code=recipe.trust_remote_code,
        )
    if recipe.row.metric != "weight" and not recipe.calibrated:
        raise RecipeError(f"calibration: method {recipe.method} needs it; give --calibration self or a text file")
    return plan


def _plan_layer(recipe: Recipe, target: Target) -> LayerPlan:
    module, fmt = target.module, FORMATS[recipe.format]
    kept = fmt.cannot_hold_shape(module, recipe.group_size)
    rank = min(recipe.rank, module.out_features, module.in_features)
    group_size = min(recipe.group_size, module.in_features)
    same = TensorSpec(target.tensor.name, target.tensor.dtype, target.tensor.shape)
    bits = recipe.widths[0]
    specs = (same,) if kept else tuple(fmt.specs(target, bits, group_size))
    return LayerPlan(target, bits, group_size, rank, kept, specs)


def working_bytes(plan: Plan) -> int:
    """Estimated peak memory on top of the libraries' own: set by the largest layer, not by the model; with
    calibration by the largest block, its statistics and the text under way. A model that writes its own text is
    in memory meanwhile, and a polish needs the source and Q of every layer at once, in float32."""
    solving = PEAK_BYTES_PER_WEIGHT * max(layer.weights for layer in plan.quantized)
    if not plan.recipe.calibrated:
        return solving
    source = 4 * sum(tensor.numel for tensor in plan.checkpoint.tensors.values())
    held = 4 * sum(layer.weights for layer in plan.quantized)
    squares = 4 * sum(layer.target.module.in_features**2 for layer in plan.quantized)
    streamed = plan.recipe.row.metric != "fisher"  # else a gradient and its square beside every weight
    solving += _measuring_bytes(plan) if streamed else source + 2 * held + squares
    if plan.recipe.row.metric == "kfac":  # the pass back has the head and some copies of its outputs
        head = max(plan.checkpoint.tensors.values(), key=lambda tensor: tensor.numel)
        tokens = min(BATCH_TOKENS, plan.recipe.calibration_samples * plan.recipe.calibration_length)
        solving = max(solving, 4 * head.numel + LOGITS_COPIES * min(LOGITS_BYTES, 4 * tokens * max(head.shape)))
    writing = plan.bytes_before if plan.recipe.calibration == "self" else 0
    polishing = 0
    if plan.recipe.polish:
        polishing = source + held + FACTOR_COPIES * plan.adapter_bytes
    return max(writing, solving, polishing)


def carried_bytes(plan: Plan) -> int:
    """Estimated size of the hidden states of the calibration text between two blocks, of all models that run."""
    streams = 2 if plan.recipe.calibration_mode == "sequential" else 1
    width = min(layer.target.module.in_features for layer in plan.quantized)
    return streams * 4 * width * plan.recipe.calibration_samples * plan.recipe.calibration_length


def _measuring_bytes(plan: Plan) -> int:
    streams = 2 if plan.recipe.calibration_mode == "sequential" else 1
    blocks: dict[str, int] = {}
    for layer in plan.quantized:  # a block is what has the same first number in its name
        parts = layer.target.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        block = ".".join(parts[: number + 1])
        blocks[block] = blocks.get(block, 0) + 4 * layer.weights
    widest = max(layer.target.module.in_features for layer in plan.quantized)
    return streams * max(blocks.values()) + carried_bytes(plan) + HESSIANS * 4 * widest**2
