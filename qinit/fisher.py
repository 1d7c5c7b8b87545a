"""How much each layer's quantization costs the model's output, at every width and rank that it may get.

A layer with error E = W - Q - L changes its output by E x at each token, and the next-token distribution by
KL = (g' E x)^2 / 2 nats to second order, g the gradient of the log-probability of a token drawn from that
distribution (its expected square is the Fisher information). So one backward pass measures all layers at once, with
the error and the input that they really have, where weight errors and output errors do not know which outputs matter.
Squares are summed token by token: what the errors of several tokens have in common is left out, which makes v_proj
look a third better than it is, but summing before squaring is so much noisier that it ranks layers worse.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qinit.calibration.blocks import Blocks, NotStreamable
from qinit.calibration.carried import Batch, Calls, Carried, batches_of
from qinit.calibration.choice import SENSITIVITY_LENGTH, SENSITIVITY_SAMPLES
from qinit.calibration.samples import Samples
from qinit.calibration.statistics import Meter, Statistics
from qinit.calibration.walk import Measuring, oriented, require_finite_input, unpadded
from qinit.calibration.whole import load_whole, read_tokens
from qinit.checkpoint import not_decomposable
from qinit.errors import CalibrationError
from qinit.sensitivity import Sensitivity, signature
from qinit.solver import seed_of, solve, stored

if TYPE_CHECKING:
    from qinit.plan import LayerPlan, Plan

ROUNDS = 1  # of the solver: the first one already shows what the layer cannot hold
BATCH_TOKENS = 1024  # logits [batch, length, vocabulary] and their gradient are in memory


def measure(
    plan: Plan,
    options: dict[str, list[tuple[int, int]]],
    samples: Samples,
    device: torch.device,
    scratch: Path | None = None,
) -> Generator[Measuring, None, Sensitivity]:
    """Measure every quantized layer at its `options` (bits, rank); yields Measuring and returns the Sensitivity.

    Block by block: a pass forward keeps what enters each block, a pass back takes the blocks in reverse, so that one
    block with its errors is in memory at a time. A model that is no row of blocks is taken whole. Uses the first
    SENSITIVITY_SAMPLES of `samples`, cut to SENSITIVITY_LENGTH. Raises CalibrationError and CheckpointError.
    """
    part = Samples(
        samples.tokens[:SENSITIVITY_SAMPLES, :SENSITIVITY_LENGTH],
        None if samples.mask is None else samples.mask[:SENSITIVITY_SAMPLES, :SENSITIVITY_LENGTH],
        samples.origin,
    )
    probe = _Probe(plan, options, part, device)
    try:
        blocks = Blocks.of(plan, device)
        yield from _streamed(blocks, probe, scratch)
    except NotStreamable:
        probe = _Probe(plan, options, part, device)
        yield from _whole(probe)
    total = max(part.count, 1)
    for name, squares in probe.squares.items():
        probe.require_number(sum(squares.values()), name)
    nats = {
        layer.target.name: {
            pair: probe.squares[layer.target.name].get(pair, 0.0) / (2 * total) for pair in options[layer.target.name]
        }
        for layer in plan.quantized
    }
    how = f"Fisher information on {part.count} tokens: {samples.origin}"
    return Sensitivity(signature(plan), how, nats)


@dataclass(frozen=True)
class _Candidate:
    """A layer's error at one width: R = W - Q [out, in] and the factors of its low rank, largest direction first."""

    bits: int
    rest: torch.Tensor
    B: torch.Tensor
    A: torch.Tensor


class _Probe:
    """Adds up (g' E x)^2 for every layer and option, as gradients arrive at the layers' outputs."""

    def __init__(
        self, plan: Plan, options: dict[str, list[tuple[int, int]]], samples: Samples, device: torch.device
    ) -> None:
        self.plan, self.options, self.samples, self.device = plan, options, samples, device
        self.layers = {layer.target.name: layer for layer in plan.quantized}
        self.squares: dict[str, dict[tuple[int, int], float]] = {name: {} for name in self.layers}
        self.candidates: dict[str, list[_Candidate]] = {}
        self.batches = list(batches_of(samples, max(1, BATCH_TOKENS // samples.tokens.shape[1])))
        self.mask: torch.Tensor | None = None
        self.generator = torch.Generator().manual_seed(plan.recipe.seed)
        self.start = torch.zeros((), device=device, requires_grad=True)  # gives a gradient to what has none yet

    def solve(self, layer: LayerPlan, weight: torch.Tensor, statistics: Statistics | None) -> None:
        """Find what is left of a layer at each width, quickly."""
        name = layer.target.name
        found = []
        for bits in sorted({bits for bits, _ in self.options[name]}):
            rank = max(rank for width, rank in self.options[name] if width == bits)
            spec = replace(
                self.plan.layer_spec(layer) if statistics is not None else self.plan.data_free_spec(layer),
                bits=bits,
                rank=rank,
                iterations=ROUNDS,
            )
            try:
                solution = solve(weight, spec, seed_of(name, self.plan.recipe.seed), statistics)
            except torch.linalg.LinAlgError as error:
                raise not_decomposable(layer.target.tensor, weight) from error
            assert solution.low_rank is not None
            rest = stored(solution.quantized, spec).neg_().add_(weight)
            found.append(_Candidate(bits, rest, solution.low_rank.B, solution.low_rank.A))
        self.candidates[name] = found

    @contextmanager
    def listening(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Measure the modules of these layers in every pass within."""

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                x = args[0].detach()
                if not output.requires_grad:
                    output = output + self.start
                output.register_hook(lambda gradient: self._add(name, x, gradient))
                return output

            return hook

        hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in modules:
                self.candidates.pop(name, None)

    def _add(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        g, x = unpadded(gradient, self.mask).float(), unpadded(x, self.mask).float()
        if len(g) != len(x):  # rows of both belong together for a linear layer
            return
        squares = self.squares[name]
        for candidate in self.candidates[name]:
            along = ((x @ candidate.rest.T) * g).sum(1)
            repaired = (x @ candidate.A.T) * (g @ candidate.B)  # [tokens, r]: what each direction gives back
            for bits, rank in self.options[name]:
                if bits == candidate.bits:
                    left = along - repaired[:, :rank].sum(1)
                    squares[bits, rank] = squares.get((bits, rank), 0.0) + float(left.square().sum(dtype=torch.float64))

    def require_number(self, value: torch.Tensor | float, what: str) -> None:
        """Raise CalibrationError for NaN and for what only an overflow makes."""
        if not -inf <= float(value) < inf:
            raise CalibrationError(
                f"{what}: NaN or Inf on the text ({self.samples.origin}) that widths are allocated by; the model "
                "overflows there: try other text, or --allocation uniform"
            )

    def loss(self, outputs: Any) -> torch.Tensor:
        """Return minus the log-probability of labels drawn from the model's own distribution, summed over tokens. A
        model without logits is taken to have a Gaussian one around its last hidden state, relative to that's size."""
        logits = getattr(outputs, "logits", None)
        if logits is None:
            hidden = outputs[0].float()
            rows = unpadded(hidden, self.mask)
            self.require_number(rows.detach().abs().sum(), "the model's output")
            noise = torch.randn(rows.shape, generator=self.generator).to(rows.device)
            return (rows * noise).sum() / rows.detach().square().sum(-1).mean().sqrt()
        rows = unpadded(logits, self.mask).float().log_softmax(-1)
        self.require_number(rows.detach().sum(), "the model's output")
        labels = torch.multinomial(rows.detach().exp().cpu(), 1, generator=self.generator)
        return -rows.gather(1, labels.to(rows.device)).sum()


def _streamed(blocks: Blocks, probe: _Probe, scratch: Path | None) -> Iterator[Measuring]:
    samples, device, count = probe.samples, probe.device, len(blocks)
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        if blocks.missing:
            raise NotStreamable(f"the checkpoint has no tensor {blocks.missing[0]}")
        calls = Calls()
        states: list[Carried] = []
        outside = [layer for name, layer in probe.layers.items() if not name.startswith(blocks.path + ".")]
        yield Measuring(0, count, tuple(probe.layers))
        with torch.no_grad():
            with blocks.surroundings():
                for batch in probe.batches:
                    hidden, found = blocks.calls(samples.tokens[batch.rows], batch.long_mask)
                    calls.add(batch, found)
                    if not states:
                        shape = (len(samples.tokens), *hidden.shape[1:])
                        states = [Carried(shape, Path(directory) / str(i), count + 1) for i in range(count + 1)]
                    states[0].write(batch, hidden)
            for index in range(count):
                block = blocks.load(index)
                for batch in probe.batches:
                    output = calls.of(batch, index)(block, states[index].read(batch).to(device))
                    states[index + 1].write(batch, output)
                blocks.unload(index)
        gradient = states[-1]  # at the output of the block that is next

        def end(batch: Batch, hidden: torch.Tensor | None = None) -> Any:
            x = gradient.read(batch).to(device) if hidden is None else hidden
            return blocks.after(samples.tokens[batch.rows], batch.long_mask, x)

        with blocks.surroundings(head=True):
            modules = {layer.target.name: blocks.model.get_submodule(layer.target.name) for layer in outside}
            with torch.no_grad():
                _solve_all(probe, outside, modules, end)
            with probe.listening(modules), torch.enable_grad():
                for batch in probe.batches:
                    probe.mask = batch.mask
                    hidden = gradient.read(batch).to(device, copy=True).requires_grad_()
                    probe.loss(end(batch, hidden)).backward()
                    gradient.write(batch, _gradient(hidden))
        for index in reversed(range(count)):
            prefix = blocks.prefix(index)
            inside = [layer for name, layer in probe.layers.items() if name.startswith(prefix)]
            yield Measuring(index, count, tuple(layer.target.name for layer in inside))
            block = blocks.load(index)
            modules = {layer.target.name: block.get_submodule(layer.target.name[len(prefix) :]) for layer in inside}

            def run(
                batch: Batch, block: nn.Module = block, index: int = index, hidden: torch.Tensor | None = None
            ) -> torch.Tensor:
                x = states[index].read(batch).to(device) if hidden is None else hidden
                return calls.of(batch, index)(block, x)

            with torch.no_grad():
                _solve_all(probe, inside, modules, run)
            with probe.listening(modules), torch.enable_grad():
                for batch in probe.batches:
                    probe.mask = batch.mask
                    hidden = states[index].read(batch).to(device, copy=True).requires_grad_()
                    run(batch, hidden=hidden).backward(gradient.read(batch).to(device))
                    gradient.write(batch, _gradient(hidden))
            blocks.unload(index)
        _as_the_others(probe, outside)


def _as_the_others(probe: _Probe, layers: list[LayerPlan]) -> None:
    """Give layers that lie in front of the blocks, where no gradient arrives, what the others lose per weight."""
    measured = [layer for name, layer in probe.layers.items() if probe.squares[name]]
    weights = sum(layer.weights for layer in measured)
    for layer in layers:
        name = layer.target.name
        if measured and not probe.squares[name]:
            for k, pair in enumerate(probe.options[name]):
                lost = sum(probe.squares[o.target.name][probe.options[o.target.name][k]] for o in measured)
                probe.squares[name][pair] = lost * layer.weights / weights


def _gradient(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(hidden) if hidden.grad is None else hidden.grad


def _solve_all(
    probe: _Probe, layers: list[LayerPlan], modules: dict[str, nn.Module], run: Callable[[Batch], Any]
) -> None:
    """Solve layers at all of their options, with the statistics of their inputs where the recipe is calibrated."""
    meters: dict[str, Meter] = {}
    if probe.plan.recipe.calibrated:
        shared: dict[str, str] = {}  # which layer's meter a layer reads: that of the first with the same input
        inputs: dict[str, torch.Tensor] = {}

        def measured(layer: LayerPlan) -> Any:
            name = layer.target.name

            def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if name not in shared:
                    shared[name] = next((first for first, other in inputs.items() if other is args[0]), name)
                if shared[name] == name:
                    inputs[name] = args[0]
                    require_finite_input(args[0], name, batch.start, probe.samples)
                    meter = meters.setdefault(name, Meter([layer], probe.device, drift=False))
                    meter.add(unpadded(args[0], batch.mask), {})

            return hook

        hooks = [modules[layer.target.name].register_forward_pre_hook(measured(layer)) for layer in layers]
        for batch in probe.batches:
            run(batch)
            inputs.clear()
        for hook in hooks:
            hook.remove()
        meters = {name: meters[first] for name, first in shared.items()}
    for layer in layers:
        linear: Any = modules[layer.target.name]
        meter = meters.get(layer.target.name)
        statistics = meter.statistics(layer) if meter is not None else None
        probe.solve(layer, oriented(linear.weight.data, layer), statistics)


def _whole(probe: _Probe) -> Iterator[Measuring]:
    plan, samples, device = probe.plan, probe.samples, probe.device
    model = load_whole(plan).to(device).requires_grad_(False)
    yield Measuring(0, 1, tuple(probe.layers))
    modules = {name: model.get_submodule(name) for name in probe.layers}

    def run(batch: Batch) -> Any:
        mask = None if batch.mask is None else batch.mask.to(device)
        return read_tokens(model, samples.tokens[batch.rows].to(device), mask, plan)

    with torch.no_grad():
        _solve_all(probe, list(probe.layers.values()), modules, run)
    with probe.listening(modules), torch.enable_grad():
        for batch in probe.batches:
            probe.mask = batch.mask
            probe.loss(run(batch)).backward()
