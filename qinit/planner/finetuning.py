"""What fine-tuning takes after a run: what stock transformers, PEFT and torch's AdamW hold, counted from the shapes of
a plan. `benchmarks/finetune_memory.py` holds it against what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qinit.plan.plan import Plan
from qinit.planner.memory import block_of
from qinit.planner.work import Model
from qinit.source.targets import LinearModule
from qinit.widths.knapsack import tied

SINGLE, HALF = 4, 2  # bytes of a number in float32, and in what autocast computes in
MOMENTS = 2  # of AdamW, in the type of the parameters
LOGITS_COPIES = 3  # in float32: log-probabilities, the gradient of them and that of the logits
UNPACKING, UNPACKING_ODD = 6, 14  # bytes per weight while one is unpacked, of 2, 4 or 8 bits and of 3


@dataclass(frozen=True)
class FineTuning:
    """Bytes that training the adapter takes on a device beside the libraries' own. `base` is as loaded; `adapter`
    counts gradients too; `activations` are what the backward pass needs, unpacked weights of layers among it; `logits`
    and `working`, what a block needs for a moment, are not there at the same time."""

    base: int
    adapter: int
    optimizer: int
    activations: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.optimizer + self.activations + max(self.logits, self.working)


def fine_tuning(plan: Plan, length: int, batch: int, *, checkpointing: bool, autocast: bool) -> FineTuning:
    """Return what training on `batch` windows of `length` tokens at once takes, with gradient checkpointing or without.
    With `autocast` the model computes in bfloat16 whatever it is stored in, as trainers do on a GPU."""
    blocks, length = _Blocks(plan, autocast), plan.facts.clip(length)
    tokens = batch * length
    scores = tokens * length * blocks.score
    kept = [tokens * blocks.kept(block) + blocks.weights(block) + scores for block in blocks.all]
    passing = max(tokens * (SINGLE + 2 * blocks.itemsize) * blocks.widest, blocks.unpacking)
    outside = tokens * SINGLE * blocks.model.width  # what the last norm reads
    if checkpointing:
        outside += tokens * blocks.itemsize * blocks.model.width * len(kept)  # what each block reads
    factors = plan.adapter_bytes
    return FineTuning(
        base=plan.base_bytes,
        adapter=2 * factors,
        optimizer=MOMENTS * factors,
        activations=outside + (0 if checkpointing else sum(kept)),
        logits=LOGITS_COPIES * SINGLE * tokens * (blocks.model.vocabulary or 0),
        working=passing + (max(kept) if checkpointing else 0),
    )


class _Blocks:
    """What the blocks of a plan's model keep for the backward pass: that of a frozen layer needs no inputs, that of an
    adapter does."""

    def __init__(self, plan: Plan, autocast: bool) -> None:
        self.plan, self.model = plan, Model(plan)
        self.ranks = {layer.target.name: layer.rank for layer in plan.layers if layer.rank}
        stored = plan.layers[0].target.tensor.dtype.itemsize
        self.itemsize = HALF if autocast else stored
        self.copy = HALF if autocast else SINGLE  # of what an adapter reads,
        self.copies = autocast or stored != SINGLE  # and whether each has its own
        assert plan.architecture.naming is not None
        config = plan.architecture.naming.model.config
        # Where no fused kernel can do it, attention keeps its scores: in float32 and, before and after, as computed.
        eager = getattr(config, "_attn_implementation", None) == "eager"
        self.score = self.model.heads * (SINGLE + 2 * self.itemsize) if eager else 0
        packed = [layer for layer in plan.quantized if len(layer.specs) > 1]
        # Kernels unpack a layer, PEFT adds an expert's adapter to its weight, autocast makes 16 bits of 32: what comes
        # of it is kept for the backward pass.
        experts = [layer for layer in plan.layers if layer.rank and layer.target.module.expert is not None]
        self.made = {layer.target.name for layer in (*packed, *experts)}
        if autocast and stored == SINGLE:
            self.made |= plan.architecture.modules.keys()
        blocks: dict[str, list[LinearModule]] = {}
        for module in plan.architecture.modules.values():
            if plan.architecture.in_language(module.name):
                blocks.setdefault(block_of(module.name), []).append(module)
        self.all = list(blocks.values())
        self.widest = max(max(m.in_features, m.out_features) for block in self.all for m in block)
        bytes_of = (layer.weights * (UNPACKING_ODD if layer.bits % 2 else UNPACKING) for layer in packed)
        self.unpacking = max(bytes_of, default=0)

    def kept(self, block: Sequence[LinearModule]) -> int:
        """Return the bytes per token: what adapters read, in their type, and have computed of it; what comes out of
        layers, for attention and activation functions; what norms read, in float32, and what comes out of attention
        and activation functions."""
        modules, found = {module.name: module for module in block}, 0.0
        for names in tied(list(modules)):
            group = [modules[name] for name in names]
            adapted = [module for module in group if module.name in self.ranks]
            share, inputs = self.model.share(group[0]), group[0].in_features
            found += share * self.copy * inputs * (len(adapted) if self.copies else min(1, len(adapted)))
            found += share * self.copy * sum(self.ranks[module.name] for module in adapted)
            if len(group) == 1 and group[0].out_features == self.model.width:  # it writes to the stream
                found += share * self.itemsize * inputs
            else:
                found += share * (self.itemsize * sum(module.out_features for module in group) + SINGLE * inputs)
        return round(found)

    def weights(self, block: Sequence[LinearModule]) -> int:
        """Return the bytes of a block's weights that are made anew in each pass forward and kept for the one back."""
        return sum(self.itemsize * m.in_features * m.out_features for m in block if m.name in self.made)
