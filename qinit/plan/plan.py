"""The plan of a run, made from headers alone: every layer, every byte, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from qinit.adapters import ADAPTER_DIRECTORY, ADAPTERS, Adapter
from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.machine import Card, pick_device
from qinit.plan.allocation import Allocation, Option
from qinit.plan.parts import Given, LayerPlan, Left, Whole
from qinit.plan.shares import EXPERTS, Share, shares_of
from qinit.recipe import BUNDLED, SELF, Recipe
from qinit.solver.methods import CALIBRATED, STARTS, UNREACHED, Method, on_base, plain
from qinit.solver.spec import LayerSpec
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import Architecture, LinearModule
from qinit.source.vocabulary import Facts
from qinit.words import parse_size

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configurations call them,
CHOSEN_COUNTS = ("num_experts_per_tok", "top_k_experts")  # and those that a token goes to


@dataclass(frozen=True)
class Plan:
    """What a run will read and write."""

    recipe: Recipe
    model_name: str
    checkpoint: Checkpoint
    architecture: Architecture
    layers: tuple[LayerPlan, ...]
    calibration_reason: str = ""  # why `auto` became what it is
    polish_reason: str = ""  # why there are so many steps of polish, where that was open
    polish_brought: bool = False  # whether a polish reads the text that qinit brings beside the model's own
    allocation: Allocation | None = None  # of mixed widths; None too while they are still to be measured
    left: tuple[Left, ...] = ()
    whole: tuple[Whole, ...] = ()
    format_reason: str = ""  # why the recipe's format is another than was asked for
    remarks: tuple[str, ...] = ()  # what of the model nobody asked for, and how to ask
    given: Given | None = None  # the base, where one is there already: then only an adapter is written
    card: Card | None = None  # the device that it is planned for, where that is another than is here

    @property
    def device(self) -> torch.device:
        """The device that it is planned for; raises RecipeError where the recipe names one that is not here."""
        return pick_device(self.recipe.device) if self.card is None else torch.device(self.card.type)

    @property
    def on_source(self) -> bool:
        """Whether the base that is there is the source itself, which an adapter starts from."""
        return self.given is not None and self.given.checkpoint.directory == self.checkpoint.directory

    @property
    def adapter(self) -> Adapter:
        """The kind of adapter that repairs the layers."""
        return ADAPTERS[self.recipe.adapter]

    @cached_property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.kept is None)

    @property
    def polish_source(self) -> str:
        """Where the text of a polish that calibration has not seen comes from: from where that of the calibration does,
        but beside the model's own, to which all layers are fitted then, it may be the text that qinit brings."""
        return BUNDLED if self.polish_brought and self.recipe.calibration == SELF else self.recipe.calibration

    @property
    def polishable(self) -> bool:
        """Whether there are layers that a polish trains; experts stay as they are."""
        return any(layer.target.module.expert is None for layer in self.quantized)

    @property
    def widest(self) -> int:
        """The inputs of the widest quantized layer."""
        return max(layer.target.module.in_features for layer in self.quantized)

    @cached_property
    def sliced(self) -> frozenset[str]:
        """Names of the source's tensors that hold several layers, a slice each: experts."""
        names = {tensor.name for layer in self.layers for tensor in layer.target.tensors}
        names -= self.checkpoint.tensors.keys()
        return frozenset(name.rpartition("[")[0] for name in names)

    @cached_property
    def pieces(self) -> tuple[StoredTensor, ...]:
        """The source's tensors in its order, those in `sliced` slice by slice."""
        return tuple(self.split_base(self.checkpoint.tensors).values())

    @cached_property
    def untouched(self) -> tuple[StoredTensor, ...]:
        """The pieces that are not quantized."""
        replaced = {tensor.name for layer in self.quantized for tensor in layer.target.tensors}
        return tuple(piece for piece in self.pieces if piece.name not in replaced)

    @property
    def copied(self) -> tuple[StoredTensor, ...]:
        """The pieces that go into the base unchanged."""
        return self.untouched if self.given is None else ()

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """What is not quantized, by kind, the largest part first."""
        return shares_of(self.checkpoint, self.architecture, self.untouched)

    @cached_property
    def base_specs(self) -> list[TensorSpec]:
        """The tensors that are written for the base, in the checkpoint's order; those in `sliced` as a whole."""
        if self.given is not None:
            return []
        layers = {layer.target.tensor.name: layer for layer in self.quantized if layer.target.module.expert is None}
        specs: list[TensorSpec] = []
        for name, tensor in self.checkpoint.tensors.items():  # experts keep name, type and shape
            specs += layers[name].specs if name in layers else [TensorSpec(name, tensor.dtype, tensor.shape)]
        return specs

    @cached_property
    def adapter_specs(self) -> list[TensorSpec]:
        """The adapter's tensors as they stand in its file."""
        factors = self.adapter.file_specs(self.ranks)
        return factors + [TensorSpec(each.name, each.tensor.dtype, each.tensor.shape) for each in self.whole]

    @property
    def ranks(self) -> list[tuple[LinearModule, int]]:
        """The layers' modules, each with the rank of its adapter."""
        return [(layer.target.module, layer.rank) for layer in self.layers]

    def split_base(self, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Return tensors of the base by name, those in `sliced` slice by slice."""
        parts = (part for name, t in tensors.items() for part in (t.slices() if name in self.sliced else [t]))
        return {part.name: part for part in parts}

    def split_adapter(self, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Return tensors of the adapter's file by the names that layers have for them."""
        return self.adapter.split(self.ranks, tensors)

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.recipe.max_shard_size)

    @property
    def bytes_before(self) -> int:
        return self.checkpoint.weight_bytes

    @property
    def moved(self) -> str:
        """Say that the source was brought into the coordinates of the base, "" where it was not."""
        if self.given is None or not self.given.moved:
            return ""
        names = sum(layer.target.module.parameter in self.given.moved for layer in self.layers)
        return (
            f"the base has scales moved between layers, as AWQ does: {names} of {len(self.layers)} layers are repaired "
            "towards the source's weights times these scales"
        )

    @property
    def base_bytes(self) -> int:
        """The size of the base's tensors, be they written or there already."""
        if self.given is not None:
            return self.given.checkpoint.weight_bytes
        return sum(spec.nbytes for spec in self.base_specs)

    @property
    def written_bytes(self) -> int:
        """The size of all that is written."""
        files = 0 if self.given is not None else self.base_bytes + self.checkpoint.companion_bytes()
        return files + self.adapter_bytes

    def adapter_directory(self, run: Path) -> Path:
        """Return where in a run's directory the adapter lies: it is all of one for a base that exists."""
        return run / ADAPTER_DIRECTORY if self.given is None else run

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
    def routed(self) -> float:
        """The share of the tokens that an expert gets."""
        config = {**self.checkpoint.config, **(self.checkpoint.config.get("text_config") or {})}
        experts, chosen = (
            next((value for key in keys if isinstance(value := config.get(key), int) and value > 0), None)
            for keys in (EXPERT_COUNTS, CHOSEN_COUNTS)
        )
        return min(1.0, chosen / experts) if experts and chosen else 1.0

    @cached_property
    def facts(self) -> Facts:
        """What the source's configuration says about the token ids that its model reads."""
        return Facts.read(self.checkpoint.directory, self.checkpoint.config, self.recipe.trust_remote_code)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: layers that are kept or left alone, ranks that were lowered."""
        notes = [f"format {self.recipe.format}: {self.format_reason}"] if self.format_reason else []
        notes += self.exceptions
        notes += self.remarks
        notes += self._expert_notes
        if self.recipe.method in CALIBRATED:
            how = f"calibration {self.recipe.calibration}" if self.recipe.calibrated else "no calibration"
            if self.calibration_reason:
                notes.append(f"{how}: {self.calibration_reason}")
        if self.polish_reason:
            notes.append(f"polish: {self.polish_reason}")
        if self.recipe.calibrated and self.recipe.row.walks and self.quantized:
            tokens = self.recipe.calibration_samples * self.facts.clip(self.recipe.calibration_length)
            more = -(-8 * self.widest // self.facts.clip(self.recipe.calibration_length))
            notes += few_tokens(self, tokens, f"give --calibration-samples {more}")
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

    @cached_property
    def exceptions(self) -> list[str]:
        """Say which chosen layers are not quantized, and why: those of one reason together."""
        kept = _by_reason((layer.target.name, layer.kept) for layer in self.layers if layer.kept)
        left = _by_reason((each.target.name, each.reason) for each in self.left)
        found = [f"{_subject(names, 'stays as it is', 'stay as they are')}: {reason}" for reason, names in kept]
        return found + [
            f"{_subject(names, 'is', 'are')} left alone, without an adapter: {reason}" for reason, names in left
        ]

    @property
    def _expert_notes(self) -> list[str]:
        """What becomes of experts and of what chooses among them."""
        notes = []
        routers, stacks = len(self.architecture.routers), self.architecture.stacks
        if routers:
            notes.append(f"{routers} linear layers that choose among experts, or weigh them, stay as they are")
        share = next((share for share in self.shares if share.what == EXPERTS), None)
        fmt = FORMATS[self.recipe.format]
        if share is not None and not fmt.holds_experts and any(stack.sources for stack in stacks):
            notes.append(
                f"{share.words(self.checkpoint.parameters)} stay in {share.bits} bits: {fmt.experts_note}; --format "
                "dense quantizes them"
            )
        for reason in dict.fromkeys(stack.unknown for stack in stacks if stack.unknown):
            names = [stack.name for stack in stacks if stack.unknown == reason]
            notes.append(f"{names[0]} ({len(names)} such) stays as it is: {reason}")
        if any(layer.target.module.expert is not None and layer.rank for layer in self.layers):
            notes.append(
                "the adapters of experts (target_parameters) need peft 0.19.1 or newer; --exclude experts leaves them "
                "as they are"
            )
        bare = [layer for layer in self.quantized if layer.target.module.expert is not None and not layer.rank]
        if bare:
            why = "PEFT adapts all experts of a block together, and not all are chosen here"
            why = why if self.adapter.experts else f"adapter {self.adapter.name} has none for them"
            notes.append(
                f"{len(bare)} matrices of experts get no adapter ({why}): what their quantization loses is not repaired"
            )
        return notes

    @property
    def _storage_note(self) -> str:
        fmt = FORMATS[self.recipe.format]
        if not fmt.mixed_bits:
            return f"format {fmt.name}: {fmt.mixed_note}"
        packing = "; ".join(
            f"--format {other.name} packs it, for {other.mixed_loaders}"
            for other in FORMATS.values()
            if other.mixed_loaders
        )
        return (
            f"format {fmt.name}: no stock loader takes packed weights of mixed widths, so Q is stored in the "
            f"checkpoint's own type; {packing}"
        )

    def layer_spec(self, layer: LayerPlan) -> LayerSpec:
        """Return what the solver is asked for this layer."""
        storage = FORMATS[self.recipe.format].storage(layer.target) if self.given is None else None
        method, iterations = self.recipe.row, self.recipe.iterations
        if not layer.rank and method.solver in ("published", "start"):  # these are about the low rank
            method = self._unreached
            iterations = method.iterations
        spec = LayerSpec(method, layer.bits, layer.group_size, layer.rank, iterations, storage)
        return replace(spec, scale=self.recipe.lora_scale, niter=self.recipe.niter)

    def data_free_spec(self, layer: LayerPlan) -> LayerSpec:
        """Return the same for a layer that the calibration text never reaches."""
        return replace(self.layer_spec(layer), method=self._unreached, iterations=self._unreached.iterations)

    @property
    def _unreached(self) -> Method:
        if self.recipe.method in STARTS:
            return plain(self.recipe.row)
        if self.given is None:
            return replace(UNREACHED, grid="sym") if self.recipe.symmetric else UNREACHED
        row = on_base(UNREACHED)
        assert row is not None
        return row


def _by_reason(reasons: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons:
        groups.setdefault(reason, []).append(name)
    return list(groups.items())


def _subject(names: list[str], one: str, many: str) -> str:
    """Name a single module, or count several and say what they are called; with the verb for it."""
    if len(names) == 1:
        return f"{names[0]} {one}"
    *kinds, last = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return f"{len(names)} modules named {' and '.join(filter(None, (', '.join(kinds), last)))} {many}"


def few_tokens(plan: Plan, tokens: int, remedy: str) -> list[str]:
    """Say where `tokens` of calibration text are fewer than the inputs of the widest layer, with the remedy."""
    if tokens >= plan.widest:
        return []
    return [
        f"calibration: {tokens} tokens are fewer than the {plan.widest} inputs of the widest layer, so H is singular "
        f"and damped more; {8 * plan.widest} or more are better: {remedy}"
    ]


def with_option(plan: Plan, layer: LayerPlan, option: Option) -> LayerPlan:
    """Return a quantized layer with another width, group size and rank."""
    specs = tuple(FORMATS[plan.recipe.format].specs(layer.target, option.bits, option.group_size))
    return replace(layer, **option._asdict(), specs=specs)
