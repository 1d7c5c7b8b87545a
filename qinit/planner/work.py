"""What a run computes, operation by operation, counted from the shapes of its plan."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from qinit.calibration.activations import BATCH_BYTES
from qinit.calibration.output_metric import DIRECTIONS
from qinit.plan.limits import (
    CHECK_WINDOW,
    GRADIENT_BATCH_TOKENS,
    GRADIENT_LENGTH,
    GRADIENT_LOGITS_BYTES,
    GRADIENT_SAMPLES,
)
from qinit.plan.plan import Plan
from qinit.planner.memory import block_of, seen_before_polish, tokens_of_polish
from qinit.planner.nominal import check_tokens, share
from qinit.planner.operations import Shape
from qinit.recipe import SELF
from qinit.source.targets import LinearModule
from qinit.text.self_text import batch_size, model_bytes
from qinit.train.polish import (
    BATCH_TOKENS,
    EVALUATE_EVERY,
    HELD_OUT,
    HELD_OUT_TOKENS,
    MOST_EVALUATIONS,
)
from qinit.widths.knapsack import tied

# Bytes per second of a file that the system holds in its memory, or on a solid disk. Not measured: the run reads each
# byte for the first time where the measurement could only read some for the second.
DISK_SPEED = 1e9
LOADS = 2  # passes over a weight that is read: converted, looked through
PACKED = 18  # passes over a weight that is packed or unpacked
CALLS = 180  # calls into torch for one layer of a model, beside what they compute; as many around all layers
BLOCK_PASSES = 16  # over the hidden states of a block: norms, rotations, sums
SEEN_PASSES = 6  # over what a group of layers reads: checked, compared, its magnitude
LOGITS_PASSES = 4  # of an exponential's cost, over the logits of a token: probabilities, a comparison
LEARNT_PASSES = 4  # over a weight, each time that a polish unpacks it
BACK = 2.5  # passes of attention and what else has no weights, in passes forward


@dataclass(frozen=True)
class Work:
    """`count` calls of an operation on a shape, for one `part` of an Estimate."""

    part: str
    operation: str
    shape: Shape
    count: float


def work_of(plan: Plan, device: torch.device, processes: int = 1) -> list[Work]:
    """Return what a run computes, but for solving, and for reading and writing. Of several `processes` each writes its
    part of the text; all else is what they do together."""
    recipe, model = plan.recipe, Model(plan)
    found: list[Work] = []
    if recipe.calibrated:
        if recipe.calibration == SELF:
            found += model.writing("text", -(-recipe.calibration_samples // processes), model.length, device)
        if recipe.row.walks:
            found += model.walk(device)
        if recipe.row.passes_back:
            found += model.there_and_back("calibrating", directions=recipe.row.walks)
    if plan.pending:
        if not recipe.calibrated and plan.facts.causal and plan.facts.start is not None:
            found += model.writing("allocating", GRADIENT_SAMPLES, plan.facts.clip(GRADIENT_LENGTH), device)
        found += model.there_and_back("allocating", again=1 if recipe.calibrated else 0, errors=len(recipe.widths))
    if recipe.polish:
        found += model.polish(device)
    if recipe.check and plan.facts.causal:
        tokens, window = check_tokens(plan), plan.facts.clip(CHECK_WINDOW)
        found += model.forward("checking", tokens, window, times=2)
        found += model.head("checking", tokens, window, times=2)
        found.append(Work("checking", "pass", (model.weights,), LOADS + PACKED))
    return found


def loading(plan: Plan) -> Work:
    """Return the passes over every weight: it is read for each pass through the model, is packed, and is unpacked where
    it is looked at again."""
    passes = LOADS * reads(plan) + (2 if plan.recipe.calibrated else 1) * PACKED
    return Work("writing", "pass", (Model(plan).weights,), passes)


def reads(plan: Plan) -> int:
    """Return how often the source is read: to be solved or walked through, and in each pass back twice."""
    backs = int(plan.recipe.calibrated and plan.recipe.row.passes_back) + int(plan.pending)
    return 1 + 2 * backs + 2 * bool(plan.recipe.polish)


def file_bytes(plan: Plan) -> int:
    """Return the bytes that a run reads and writes."""
    checked = plan.base_bytes + plan.bytes_before if plan.recipe.check and plan.facts.causal else 0
    return reads(plan) * plan.bytes_before + 2 * (plan.base_bytes + plan.adapter_bytes) + checked


class Model:
    """What a plan's model computes for a token: its linear layers by block, and its sizes."""

    def __init__(self, plan: Plan) -> None:
        self.plan, recipe, facts = plan, plan.recipe, plan.facts
        self.length = facts.clip(recipe.calibration_length)
        self.tokens = recipe.calibration_samples * self.length
        self.config = {**plan.checkpoint.config, **(plan.checkpoint.config.get("text_config") or {})}
        self.chosen = {layer.target.name for layer in plan.quantized}
        self.blocks: dict[str, list[LinearModule]] = {}
        self.linear = [module for module in plan.architecture.linear if plan.architecture.in_language(module.name)]
        for module in self.linear:
            self.blocks.setdefault(block_of(module.name), []).append(module)
        reading = [m for m in plan.architecture.modules.values() if plan.architecture.in_language(m.name)]
        self.experts = Counter((m.in_features, m.out_features) for m in reading if m.expert is not None)
        self.weights = sum(module.in_features * module.out_features for module in reading)
        self.width = self._size("hidden_size", "n_embd", "d_model") or min(m.in_features for m in self.linear)
        self.heads = self._size("num_attention_heads", "n_head", "num_heads") or 1
        self.shared = self._size("num_key_value_heads") or self.heads
        self.head_width = self._size("head_dim", "d_kv") or max(1, self.width // self.heads)
        self.vocabulary = facts.vocabulary if facts.causal else None

    def _size(self, *keys: str) -> int | None:
        found = (self.config.get(key) for key in keys)
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    def share(self, module: LinearModule) -> float:
        """Return the share of the tokens that reach a layer: of experts, what each gets."""
        return share(self.plan, module)

    def products(
        self, part: str, tokens: float, rows: int, times: Sequence[float] | float = 1.0, operation: str = "product"
    ) -> Iterator[Work]:
        """Yield the products of `tokens` with every layer, `rows` at once; `times` for each layer, in order, or all."""
        shapes: dict[tuple[int, int], float] = defaultdict(float)
        modules = [module for block in self.blocks.values() for module in block]
        each = [times] * len(modules) if isinstance(times, int | float) else times
        for module, count in zip(modules, each, strict=True):
            shapes[module.in_features, module.out_features] += count * self.share(module)
        for shape, experts in self.experts.items():
            shapes[shape] += max(each, default=1.0) * experts * self.plan.routed
        for (inputs, outputs), count in shapes.items():
            yield Work(part, operation, (rows, inputs, outputs), count * tokens / rows)

    def around(
        self, part: str, tokens: float, rows: int, length: int, attention: float, inner: float
    ) -> Iterator[Work]:
        """Yield what a model does beside its products, with so many passes through attention and through what comes
        behind it, summed over the blocks."""
        widest = max(max(module.in_features, module.out_features) for module in self.linear)
        yield Work(part, "attention", (self.heads, length, self.head_width), attention * tokens / length)
        mean = (attention + inner) / 2
        yield Work(part, "pass", (rows, self.width), BLOCK_PASSES * mean * tokens / rows)
        yield Work(part, "exponential", (rows, widest), 2 * inner * tokens / rows)
        yield Work(part, "small", (CALLS,), mean * tokens / rows)

    def forward(self, part: str, tokens: float, rows: int, times: float = 1.0) -> Iterator[Work]:
        """Yield what running the model over `tokens` takes, `rows` at once, `times` over; without its head."""
        count, length = times * len(self.blocks), min(rows, self.length)
        yield from self.products(part, tokens, rows, times)
        yield from self.around(part, tokens, rows, length, count, count)

    def head(self, part: str, tokens: float, rows: int, times: float = 1.0) -> Iterator[Work]:
        """Yield the logits of `tokens`, and what becomes of them."""
        if self.vocabulary:
            yield Work(part, "product", (rows, self.width, self.vocabulary), times * tokens / rows)
            yield Work(part, "exponential", (rows, self.vocabulary), LOGITS_PASSES * times * tokens / rows)

    def writing(self, part: str, samples: int, length: int, device: torch.device) -> Iterator[Work]:
        """Yield what it takes to write text: token after token for a batch at once."""
        config: Any = SimpleNamespace(**{**self.config, "vocab_size": self.vocabulary or 1})
        stored = self.plan.bytes_before
        itemsize = 4 if model_bytes(stored, device) > stored else 2
        batches = -(-samples // batch_size(config, length, itemsize, device))
        batch, steps = -(-samples // batches), batches * (length - 1)
        yield from self.products(part, batch * steps, batch, operation="step")
        cache = (batch, self.heads, self.shared, max(1, length // 2), self.head_width)
        yield Work(part, "recall", cache, steps * len(self.blocks))
        yield Work(part, "small", (CALLS,), steps * (len(self.blocks) + 1))
        if self.vocabulary:
            yield Work(part, "step", (batch, self.width, self.vocabulary), steps)
            yield Work(part, "draw", (batch, self.vocabulary), steps)

    def walk(self, device: torch.device) -> Iterator[Work]:
        """Yield the passes over the text that measure the layers, and their statistics."""
        part, tokens = "calibrating", self.tokens
        widest = max(max(module.in_features, module.out_features) for module in self.linear)
        rows = self.length * max(1, min(tokens // self.length, BATCH_BYTES[device.type] // (4 * widest * self.length)))
        passes = [self.passes(block) for block in self.blocks.values()]
        yield from self.products(part, tokens, rows, [count for block in passes for count in block])
        attention, inner = sum(block[0] for block in passes), sum(max(block[-2:-1] or block) for block in passes)
        yield from self.around(part, tokens, rows, self.length, attention, inner)
        for block in self.blocks.values():
            yield from self._statistics(part, block, rows)
        measured = self.experts if any(layer.target.module.expert for layer in self.plan.quantized) else Counter()
        for (size, _), count in measured.items():  # of each expert, and of all of a parameter's together
            yield Work(part, "moment", (rows, size), 2 * count * self.plan.routed * tokens / rows)

    def passes(self, block: Sequence[LinearModule]) -> list[int]:
        """Return how often the text runs through each layer of a block: the original once, the repaired one as far as
        each group that comes behind the layer, and through the last one to its end, whose repair is then one more
        product; a block that ends with something else is run through once more. Together 2.7 times in a Llama."""
        if self.plan.recipe.calibration_mode != "sequential":
            return [1] * len(block)
        groups = self._groups(block)
        at_end = bool(groups) and groups[-1][-1] == len(block) - 1
        behind = [1 + sum(group[0] > place for group in groups) for place in range(len(block))]
        if not at_end:
            return [count + 1 for count in behind]
        return [count + 2 if place in groups[-1] else count for place, count in enumerate(behind)]

    def _groups(self, block: Sequence[LinearModule]) -> list[list[int]]:
        """Return the places of a block's quantized layers, those together that read the same by their names."""
        places = {module.name: place for place, module in enumerate(block)}
        found = [[places[name] for name in group] for group in tied([n for n in places if n in self.chosen])]
        return sorted(found)

    def _statistics(self, part: str, block: Sequence[LinearModule], rows: int) -> Iterator[Work]:
        """Yield the second moments of each group's inputs, and how far the repaired model is from the original."""
        sequential = self.plan.recipe.calibration_mode == "sequential"
        groups = self._groups(block)
        for group in groups:
            inputs, outputs = block[group[0]].in_features, sum(block[place].out_features for place in group)
            count = self.share(block[group[0]]) * self.tokens / rows
            yield Work(part, "moment", (rows, inputs), count)
            yield Work(part, "pass", (rows, inputs), SEEN_PASSES * count)
            if not sequential:
                continue
            last = group is groups[-1]
            if not last:
                yield Work(part, "product", (rows, inputs, min(inputs, 2 * outputs)), count)
            if last or (len(group) == 1 and outputs == self.width):
                yield Work(part, "product", (rows, inputs, outputs), count)

    def there_and_back(self, part: str, *, again: int = 0, directions: bool = False, errors: int = 0) -> Iterator[Work]:
        """Yield a pass forward that keeps what enters each block, and one forward and back through each; `again` that
        many times more forward, `directions` of the gradients that are kept, `errors` that each layer is tried with."""
        length, samples = self.plan.facts.clip(GRADIENT_LENGTH), GRADIENT_SAMPLES
        if self.plan.recipe.calibrated:
            length, samples = min(self.length, length), min(self.plan.recipe.calibration_samples, samples)
        tokens = length * samples
        at_once = min(GRADIENT_BATCH_TOKENS, GRADIENT_LOGITS_BYTES // (4 * (self.vocabulary or 1)))
        rows = min(tokens, max(1, at_once // length) * length)
        blocks = len(self.blocks)
        yield from self.products(part, tokens, rows, 3 + again)
        yield from self.around(part, tokens, rows, length, blocks * (2 + again + BACK), blocks * (2 + again + BACK))
        yield from self.head(part, tokens, rows, 2)
        for layer in self.plan.quantized:
            module = layer.target.module
            count = self.share(module) * tokens / rows
            if directions and module.expert is None:
                yield Work(part, "directions", (rows + DIRECTIONS, module.out_features), count)
            if errors:
                yield Work(part, "product", (rows, module.in_features, module.out_features), errors * count)

    def polish(self, device: torch.device) -> Iterator[Work]:
        """Yield its text, where the model writes it, the teacher's pass over that, the steps, and the evaluations
        between them."""
        part, steps, length = "polishing", self.plan.recipe.polish_steps, self.length
        seen = seen_before_polish(self.plan)
        tokens = tokens_of_polish(self.plan, seen)
        if self.plan.polish_source == SELF and tokens > seen:
            yield from self.writing(part, -(-(tokens - seen) // length), length, device)
        rows = max(1, BATCH_TOKENS // length) * length
        yield from self.forward(part, tokens, rows)
        yield from self.head(part, tokens, rows)
        yield from self.products(part, steps * rows, rows, 4)  # forward, once more, and back to inputs and to scales
        blocks = len(self.blocks)
        yield from self.around(part, steps * rows, rows, length, blocks * (2 + BACK), blocks * (2 + BACK))
        yield from self.head(part, steps * rows, rows, 2)
        held_out = max(1, min(tokens // length // HELD_OUT, HELD_OUT_TOKENS // length)) * length
        evaluations = 1 + steps // max(EVALUATE_EVERY, steps // MOST_EVALUATIONS)
        yield from self.forward(part, evaluations * held_out, rows)
        yield from self.head(part, evaluations * held_out, rows)
        unpacked = 4 * steps + evaluations * max(1, held_out // rows)  # the gradient of the scales counts as one
        yield Work(part, "pass", (self.weights,), LEARNT_PASSES * unpacked)
