"""Fine-tuning in one small loop, so that every start gets the same data, order, steps and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 15  # one step in so many, at least one
CLIP = 1.0  # the largest norm of all gradients together


@dataclass(frozen=True)
class Training:
    """How long and on how much: each of `steps` optimizer steps sees `batch` windows of `length` tokens.

    `micro_batch` windows go through the model at once, their gradients add up (None: all of them); with
    `checkpointing` activations are computed again in the backward pass instead of kept.
    """

    steps: int
    length: int = 128
    batch: int = 8
    micro_batch: int | None = None
    checkpointing: bool = False

    @property
    def warm_up(self) -> int:
        return max(1, self.steps // WARM_UP)

    def rate_at(self, step: int) -> float:
        """Return the share of the learning rate at a step: linear warm-up, then a cosine to zero."""
        return min(1.0, (step + 1) / self.warm_up) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class DivergedError(Exception):
    """The loss is no longer a number: the outcome of a learning rate, and nobody's mistake."""

    def __init__(self, step: int):
        super().__init__(f"the loss was no finite number at step {step}")


def batches(count: int, training: Training, seed: int) -> Iterator[list[int]]:
    """Yield for each step which of `count` windows it sees: all of them in a random order, then in another one.

    The order depends on nothing but `count`, the batch and `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(training.steps):
        while len(queue) < training.batch:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[: training.batch]
        queue = queue[training.batch :]


def finetune(
    model: Any,
    tokens: torch.Tensor,
    training: Training,
    *,
    rate: float,
    seed: int,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train those parameters of a causal language model that ask for gradients, in place, on `tokens` [n].

    The windows do not overlap; `seed` sets their order. AdamW without weight decay, linear warm-up over one step in
    15, cosine decay to zero, gradients clipped at norm 1; on CUDA the forward pass runs under bfloat16 autocast.
    `progress` gets each finished step's number, from 1, and its loss in nats. Raises DivergedError.
    """
    count = len(tokens) // training.length
    windows = tokens[: count * training.length].view(count, training.length)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.rate_at)
    if training.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for step, chosen in enumerate(batches(count, training, seed), 1):
        loss = 0.0
        for part in windows[chosen].split(training.micro_batch or training.batch):
            part = part.to(model.device)
            with _autocast(model.device):
                mean = model(input_ids=part, labels=part, use_cache=False).loss * (len(part) / training.batch)
            mean.backward()
            loss += mean.item()
        if not math.isfinite(loss):
            raise DivergedError(step)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step, loss)
    model.eval()


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
