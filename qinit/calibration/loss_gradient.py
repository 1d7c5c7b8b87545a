"""The gradient of the loss with respect to each layer's weight, as its leading singular triplets: LoRA-GA's start."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qinit.calibration.backward import backward
from qinit.calibration.probe import OverflowedError, Part, Probe, require_number
from qinit.errors import CalibrationError
from qinit.events import Measuring
from qinit.linalg.low_rank import leading, random_basis
from qinit.plan.plan import Plan
from qinit.solver.spec import Gradient, seed_of
from qinit.text.samples import Portion, Samples

SHARE = 2  # triplets for each of the adapter's ranks: half of them give A, half of them B
WIDER = 2  # times as many directions are iterated, as in PEFT's lora_ga_init
STEPS = 5  # of subspace iteration: its svd_lowrank does one, and four more


def loss_gradients(
    plan: Plan, samples: Samples, device: torch.device, scratch: Path | None = None, portion: Portion = int
) -> Generator[Measuring, None, dict[str, Gradient]]:
    """Measure, for every linear layer that it reaches, the mean gradient of the next token's loss on `samples`, all of
    them; return 2 r singular triplets of each, r the layer's rank.

    One block with the gradients of its layers is in memory at a time. Raises CalibrationError and CheckpointError.
    """
    try:
        probe: _Gradients = yield from backward(partial(_Gradients, plan, samples, device, portion), scratch)
    except OverflowedError as what:
        raise CalibrationError(
            f"{what}: NaN or Inf on the text ({samples.origin}); the model overflows there"
        ) from None
    return probe.found


class _Gradients(Probe):
    """Adds up g x' for the layers that the pass back is at."""

    whole = True

    def __init__(self, plan: Plan, samples: Samples, device: torch.device, portion: Portion) -> None:
        super().__init__(plan, samples, device, portion=portion)
        self.sums: dict[str, torch.Tensor] = {}
        self.found: dict[str, Gradient] = {}
        mask = self.samples.mask
        self.predicted = self.samples.tokens[:, 1:].numel() if mask is None else int(mask[:, 1:].sum())

    def loss(self, outputs: Any) -> torch.Tensor:
        """Return the loss of the next token, summed over a batch's share of all tokens that are predicted."""
        assert self.batch is not None
        labels = self.batch.of(self.samples.tokens)[:, 1:].to(self.device)
        rows = outputs.logits[:, :-1].float().log_softmax(-1)
        found = rows.gather(-1, labels[..., None])[..., 0]
        if self.mask is not None:
            found = found[self.mask[:, 1:].to(self.device)]
        require_number(found.detach().sum(), "the model's output")
        return -found.sum() / max(self.predicted, 1)

    def add(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        if len(gradient) != len(x):  # rows of both belong together for a linear layer
            return
        if name in self.sums:
            self.sums[name].addmm_(gradient.T, x)
        else:
            self.sums[name] = gradient.T @ x

    def done(self, part: Part) -> None:
        """Keep what an adapter starts from."""
        for layer in part.layers:
            total = self.sums.pop(layer.target.name, None)
            if total is None or not layer.rank:
                continue
            require_number(total.abs().sum(), layer.target.name)
            count = SHARE * layer.rank
            seed = seed_of(layer.target.name, self.plan.recipe.seed)
            basis = random_basis(total.shape[1], WIDER * count, seed, total.device)
            self.found[layer.target.name] = Gradient(*leading(total, count, basis, STEPS))
