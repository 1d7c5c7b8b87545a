"""What a pass back measures of the layers it goes through, and the loss that it takes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import nn

from qinit.calibration.activations import unpadded, weight_in
from qinit.calibration.experts import parameters_of
from qinit.calibration.shards import share_of
from qinit.files.tensors import slice_name
from qinit.plan.limits import GRADIENT_BATCH_TOKENS, GRADIENT_LENGTH, GRADIENT_LOGITS_BYTES, GRADIENT_SAMPLES
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.processes.group import ALONE, Processes
from qinit.source.products import Product, Products, one_by_one
from qinit.stream.carried import Batch, batches_of
from qinit.text.samples import Portion, Samples

Run = Callable[[Batch], Any]  # takes a batch through the layers at hand


class OverflowedError(Exception):
    """NaN, or what only an overflow makes; the message says where."""


def require_number(value: torch.Tensor | float, what: str) -> None:
    """Raise OverflowedError for NaN and Inf; minus Inf is the log-probability of a token that cannot be."""
    if not -inf <= float(value) < inf:
        raise OverflowedError(what)


@dataclass(frozen=True)
class Part:
    """Layers that lie in a module `root`, which the model calls `prefix` (with a dot at its end, or nothing)."""

    root: nn.Module
    prefix: str
    layers: list[LayerPlan]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of the linear layers by their names in the model."""
        names = [layer.target.name for layer in self.layers if layer.target.module.expert is None]
        return {name: self.root.get_submodule(self.inner(name)) for name in names}

    @property
    def stacks(self) -> dict[str, torch.Tensor]:
        """The 3-D parameters of the experts by their names in the model."""
        names = parameters_of([layer.target.name for layer in self.layers])
        return {name: self.root.get_parameter(self.inner(name)) for name in names}

    def weight(self, layer: LayerPlan) -> torch.Tensor:
        """Return a layer's weight [out, in]."""
        return weight_in(self.root, self.inner(layer.target.name), layer)

    def inner(self, name: str) -> str:
        return name.removeprefix(self.prefix)


class Probe(ABC):
    """What is done with the gradient g of minus the log-probability of a token drawn from the model's own distribution,
    as it arrives at a layer's output [tokens, out]; its expected square is the Fisher information. `experts`: whether
    it looks at experts too; `whole`: whether it reads all of the text, and not only its beginning; `in_shards`: whether
    it adds up shards of the text alone, so that `processes` can share it. `portion` is of what goes at once."""

    experts = False
    whole = False
    in_shards = False

    def __init__(
        self, plan: Plan, samples: Samples, device: torch.device, processes: Processes = ALONE, portion: Portion = int
    ) -> None:
        self.plan, self.device, self.processes = plan, device, processes
        part = (slice(None), slice(None)) if self.whole else (slice(GRADIENT_SAMPLES), slice(GRADIENT_LENGTH))
        mask = None if samples.mask is None else samples.mask[part]
        self.samples = Samples(samples.tokens[part], mask, samples.origin)
        self.layers = {
            layer.target.name: layer for layer in plan.quantized if self.experts or layer.target.module.expert is None
        }
        tokens = min(GRADIENT_BATCH_TOKENS, GRADIENT_LOGITS_BYTES // (4 * (plan.facts.vocabulary or 1)))
        self.batches = list(batches_of(self.samples, size := portion(max(1, tokens // self.samples.tokens.shape[1]))))
        if self.in_shards:
            share = share_of(self.samples, size, processes)
            self.samples, self.batches = share.samples, share.batches
        self.batch: Batch | None = None  # that is under way
        self.shard: int | None = None
        self.generator = torch.Generator()
        self.start = torch.zeros((), device=device, requires_grad=True)  # gives a gradient to what has none yet
        self.outside: list[LayerPlan] = []  # layers in front of the blocks or behind them

    @property
    def mask(self) -> torch.Tensor | None:
        return None if self.batch is None else self.batch.mask

    def turn_to(self, batch: Batch) -> None:
        """Called before each batch. What is drawn for a shard depends on the shard alone."""
        if batch.shard != self.shard:
            self.generator.manual_seed((self.plan.recipe.seed + batch.shard) % 2**63)
        self.batch, self.shard = batch, batch.shard

    def prepare(self, part: Part, run: Run) -> None:  # noqa: B027 - optional
        """Called before the pass back reaches these layers."""

    @abstractmethod
    def add(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Called with a layer's input [tokens, in] and the gradient [tokens, out] at its output, for each batch."""

    def done(self, part: Part) -> None:  # noqa: B027 - optional
        """Called by all processes after the pass back has gone through these layers."""

    @contextmanager
    def listening(self, part: Part) -> Iterator[None]:
        """Add what arrives at these layers in every pass within."""

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                x = args[0].detach()
                if not output.requires_grad:
                    output = output + self.start
                output.register_hook(
                    lambda arrived: self.add(name, *(unpadded(rows, self.mask).float() for rows in (x, arrived)))
                )
                return output

            return hook

        hooks = [module.register_forward_hook(keep(name)) for name, module in part.modules.items()]
        try:
            with self._listening_to_experts(part):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _listening_to_experts(self, part: Part) -> Iterator[None]:
        stacks = part.stacks
        if not stacks:
            yield
            return

        def given(products: list[Product], output: torch.Tensor) -> torch.Tensor:
            output = output if output.requires_grad else output + self.start

            def arrived(gradient: torch.Tensor) -> None:
                for product, own in zip(products, gradient.reshape(len(products), -1, gradient.shape[-1]), strict=True):
                    name, x = slice_name(product.parameter, product.index), product.x.detach()
                    chosen = x.any(-1)
                    if name in self.layers and bool(chosen.any()):
                        self.add(name, x[chosen].float(), own[chosen].float())

            output.register_hook(arrived)
            return output

        with one_by_one(part.root), Products(stacks, given=given):
            yield

    def loss(self, outputs: Any) -> torch.Tensor:
        """Return minus the log-probability of labels drawn from the model's own distribution, summed over tokens. A
        model without logits is taken to have a Gaussian one around its last hidden state, relative to that's size."""
        logits = getattr(outputs, "logits", None)
        if logits is None:
            hidden = outputs[0].float()
            rows = unpadded(hidden, self.mask)
            require_number(rows.detach().abs().sum(), "the model's output")
            noise = torch.randn(rows.shape, generator=self.generator).to(rows.device)
            return (rows * noise).sum() / rows.detach().square().sum(-1).mean().sqrt()
        rows = unpadded(logits, self.mask).float().log_softmax(-1)
        require_number(rows.detach().sum(), "the model's output")
        return -rows.gather(1, drawn(rows.detach(), self.generator)[:, None]).sum()


def drawn(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a label for each row of log-probabilities [tokens, vocabulary], by a number of the CPU's `generator`: the
    same on every device, but for ties. Takes the memory of one copy."""
    up_to = rows.exp().cumsum_(-1)
    chance = torch.rand(len(up_to), 1, generator=generator).to(up_to.device)
    return torch.searchsorted(up_to, chance * up_to[:, -1:], right=True).clamp(max=up_to.shape[1] - 1)[:, 0]
