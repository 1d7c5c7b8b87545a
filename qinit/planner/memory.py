"""How much memory a run will take, and how much disk for what passes through."""

from __future__ import annotations

import re

from qinit.calibration.experts import PORTION_BYTES
from qinit.formats import FORMATS
from qinit.machine import CPU
from qinit.plan.limits import CHECK_WINDOW, GRADIENT_BATCH_TOKENS, GRADIENT_LOGITS_BYTES
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.recipe import SELF
from qinit.stream.carried import place_for
from qinit.stream.stored import HALVES, LARGE
from qinit.text.self_text import model_bytes
from qinit.train.bases import NIBBLE
from qinit.train.polish import MICRO_BYTES, polish_tokens
from qinit.train.teacher import TOP

# Float32 weight, residual and one temporary of the same size, codes twice, the source and the packed result.
PEAK_BYTES_PER_WEIGHT = 18
FACTOR_COPIES = 5  # of the polish: what is trained, its gradients, two moments, the best iterate
LOGITS_OF_POLISH = 6  # logits, log-probabilities, their gradients
LOGITS_COPIES = 4  # of the pass back: logits, log-probabilities, probabilities, the gradient
CHECK_COPIES = 2  # of a window's logits: themselves, and what becomes of them
HESSIANS = 2  # H itself, and that without what the adapter repairs, which its Cholesky factor takes the place of
MEANS = 1.2  # of H while it is measured: half of it twice, the shard that is read and those before it
DRIFTS = 3  # of a layer: the same, and their sum


def scratch_bytes(plan: Plan) -> int:
    """Estimate what the activations of a calibrated run will take on disk: nothing where memory holds them."""
    if not plan.recipe.calibrated:
        return 0
    return sum(size for size in (carried_bytes(plan), _shelf_bytes(plan)) if place_for(size, CPU) is None)


def working_bytes(plan: Plan, processes: int = 1) -> int:
    """Estimated peak memory on top of the libraries' own: set by the largest layer, not by the model; with
    calibration by the largest block, its statistics and the text under way, of which each of several `processes` has a
    part. A model that writes its own text is in memory meanwhile, and a polish has Q of all layers, as codes, and what
    is no layer of the source."""
    solving = PEAK_BYTES_PER_WEIGHT * max(layer.weights for layer in plan.quantized)
    checking = _checking_bytes(plan)
    if not plan.recipe.calibrated:
        return max(solving, checking)
    source = 4 * plan.checkpoint.parameters
    held = 4 * sum(layer.weights for layer in plan.quantized)
    squares = 4 * sum(layer.target.module.in_features**2 for layer in _linear(plan)) + _portion_bytes(plan)
    streamed = "fisher" not in plan.recipe.row.needs  # else a gradient and its square beside every weight
    solving = _measuring_bytes(plan, processes) if streamed else solving + source + 2 * held + squares
    if plan.recipe.row.passes_back:  # the pass back has the head and some copies of its outputs
        head = max(plan.checkpoint.tensors.values(), key=lambda tensor: tensor.numel)
        tokens = min(GRADIENT_BATCH_TOKENS, _tokens(plan))
        logits = min(GRADIENT_LOGITS_BYTES, 4 * tokens * max(head.shape))
        solving = max(solving, sum(_outside_bytes(plan)) + LOGITS_COPIES * logits)
    writing = 0
    if plan.recipe.calibration == SELF:
        writing = model_bytes(plan.bytes_before, plan.device)
    return max(writing, solving, (polishing_bytes(plan) if plan.recipe.polish else 0), checking)


def polish_disk_bytes(plan: Plan) -> int:
    """Estimate what a polish keeps on disk: the source's outputs for its text, and where it stands."""
    if not plan.recipe.polish:
        return 0
    width = min(layer.target.module.in_features for layer in plan.quantized)
    tokens = tokens_of_polish(plan, seen_before_polish(plan))
    return tokens * (2 * width + 6 * TOP) + 4 * _trained_bytes(plan)


def seen_before_polish(plan: Plan) -> int:
    """Of the text of a polish, how many tokens calibration has seen."""
    return plan.recipe.calibration_samples * plan.facts.clip(plan.recipe.calibration_length)


def tokens_of_polish(plan: Plan, seen: int) -> int:
    """Return how many tokens the text of a polish has of which calibration has `seen` some: of another source there are
    as many beside these as if it had seen none."""
    steps = plan.recipe.polish_steps
    if plan.polish_source == plan.recipe.calibration:
        return polish_tokens(steps, seen)
    return seen + polish_tokens(steps, 0)


def carried_bytes(plan: Plan) -> int:
    """Estimated size of the hidden states of the calibration text between two blocks, of all models that run."""
    streams = 3 if plan.recipe.calibration_mode == "sequential" else 1
    width = min(layer.target.module.in_features for layer in _linear(plan))
    return streams * 4 * width * _tokens(plan)


def _shelf_bytes(plan: Plan) -> int:
    """Estimate what is kept of a block's activations until the repaired block has come so far; layers read the same in
    pairs, mostly."""
    if plan.recipe.calibration_mode != "sequential":
        return 0
    widths: dict[str, int] = {}
    for layer in _linear(plan):
        block = block_of(layer.target.name)
        widths[block] = widths.get(block, 0) + layer.target.module.in_features
    return 4 * _tokens(plan) * max(widths.values()) // 2


def _tokens(plan: Plan) -> int:
    """Of the calibration text, as many as are asked for."""
    return plan.recipe.calibration_samples * plan.recipe.calibration_length


def _trained_bytes(plan: Plan) -> int:
    """Factors and scales, in float32."""
    return plan.adapter_bytes + sum(4 * layer.weights // plan.recipe.group_size for layer in plan.quantized)


def polishing_bytes(plan: Plan) -> int:
    """Estimated peak memory of a polish: Q of all layers, what is no layer of the source, what is trained, logits."""
    coded = FORMATS[plan.recipe.format].storage(plan.quantized[0].target) is None
    held = sum(layer.weights if layer.bits > NIBBLE else layer.weights // 2 for layer in plan.quantized)
    if not coded:
        held = sum(
            layer.target.nbytes if layer.target.module.expert is None else 4 * layer.weights for layer in plan.quantized
        )
    inside = sum(layer.weights for layer in plan.quantized)
    outside = 4 * (plan.checkpoint.parameters - inside)
    logits = max(MICRO_BYTES, 4 * plan.facts.clip(plan.recipe.calibration_length) * (plan.facts.vocabulary or 1))
    return held + outside + FACTOR_COPIES * _trained_bytes(plan) + LOGITS_OF_POLISH * logits


def _checking_bytes(plan: Plan) -> int:
    """What lies outside of the blocks (embeddings, the head), once more the largest of it while the two models are
    compared, and the logits of a window of both."""
    if not (plan.recipe.check and plan.facts.causal):
        return 0
    outside = _outside_bytes(plan)
    logits = 4 * plan.facts.clip(CHECK_WINDOW) * (plan.facts.vocabulary or 1)
    return sum(outside) + max(outside, default=0) + 2 * CHECK_COPIES * logits


def _outside_bytes(plan: Plan) -> list[int]:
    """What the tensors outside of the blocks take: float32, or as they are stored where they are large."""
    return [
        tensor.numel * (2 if tensor.numel >= LARGE and tensor.dtype in HALVES else 4)
        for name, tensor in plan.checkpoint.tensors.items()
        if not re.search(r"\.\d+\.", name)
    ]


def _measuring_bytes(plan: Plan, processes: int) -> int:
    """The text under way, and the most that a layer takes while it is measured and solved, with its block: the widest
    layers of a block are the last, and alone in memory by then where the block does not run again."""
    sequential = plan.recipe.calibration_mode == "sequential"
    blocks: dict[str, list[LayerPlan]] = {}
    for layer in plan.quantized:
        blocks.setdefault(block_of(layer.target.name), []).append(layer)
    most = 0
    for layers in blocks.values():
        held = (2 if sequential else 1) * 4 * sum(layer.weights for layer in layers)
        widest = max(layer.target.module.in_features for layer in layers)
        for layer in layers:
            square, alone = 4 * layer.target.module.in_features**2, layer.target.module.in_features == widest
            alone = alone and sequential and not plan.recipe.row.stages and layer.target.module.expert is None
            measuring = MEANS * square + (DRIFTS * 4 * layer.weights if sequential else 0)
            solving = HESSIANS * square + PEAK_BYTES_PER_WEIGHT * layer.weights
            most = max(most, int(held + measuring), solving + (0 if alone else held))
    return most + _portion_bytes(plan) + (carried_bytes(plan) + _shelf_bytes(plan)) // processes


def _portion_bytes(plan: Plan) -> int:
    """The H matrices of experts that are measured at once."""
    stacks: dict[str, int] = {}
    for layer in plan.quantized:
        if layer.target.module.expert is not None:
            name, size = layer.target.module.parameter, 4 * layer.target.module.in_features**2
            stacks[name] = max(size, min(PORTION_BYTES, stacks.get(name, size) + size))
    return max(stacks.values(), default=0)


def _linear(plan: Plan) -> list[LayerPlan]:
    """The layers that are modules of their own, or all where only experts are chosen."""
    return [layer for layer in plan.quantized if layer.target.module.expert is None] or list(plan.quantized)


def block_of(name: str) -> str:
    """Return the name of a layer's block: what has the same first number in it."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])
