"""How much each layer's quantization costs the model's output, at every width and rank that it may get.

A layer with error E = W - Q - L changes its output by E x at each token, and the next-token distribution by
KL = (g' E x)^2 / 2 nats to second order, g the gradient of the log-probability of a token drawn from that
distribution (its expected square is the Fisher information). So one backward pass measures all layers at once, with
the error and the input that they really have, where weight errors and output errors do not know which outputs matter.
Squares are summed token by token: what the errors of several tokens have in common is left out, which makes v_proj
look a quarter better than it is, and k_proj up to a third worse. Summing over a text before squaring is right, and so
much noisier that it ranks layers worse; sums over a few tokens are closer than either, and choose no better widths.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qinit.calibration.activations import require_finite_input, unpadded
from qinit.calibration.backward import backward
from qinit.calibration.experts import ExpertMeters, listening, portions
from qinit.calibration.meter import Meter
from qinit.calibration.probe import OverflowedError, Part, Probe, Run, require_number
from qinit.errors import CalibrationError
from qinit.events import Measuring
from qinit.linalg.low_rank import OutputMetric
from qinit.plan.allocation import Option, Sensitivity
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.processes.group import ALONE, Processes
from qinit.solver.residual import as_loaded
from qinit.solver.solve import solve
from qinit.solver.spec import seed_of
from qinit.solver.statistics import Statistics
from qinit.source.checkpoint import not_decomposable
from qinit.stream.carried import Batch
from qinit.text.samples import Portion, Samples
from qinit.widths.validity import conditions

ROUNDS = 1  # of the solver: the first one already shows what the layer cannot hold


def measure(
    plan: Plan,
    options: dict[str, list[Option]],
    samples: Samples,
    device: torch.device,
    scratch: Path | None = None,
    metrics: Mapping[str, OutputMetric] | None = None,
    processes: Processes = ALONE,
    portion: Portion = int,
) -> Generator[Measuring, None, Sensitivity]:
    """Measure every quantized layer at its `options`; yields Measuring and returns the Sensitivity.

    `metrics` are those of the layers' outputs that the run will fit their low rank under, by name.
    Takes a part of `samples` forward and back, see `backward`; one block with its errors is in memory at a time.
    Several `processes` all do that, each solves and measures the layers of its share of the blocks, and all are told
    what the others have found: the same as one alone finds. Raises CalibrationError and CheckpointError.
    """
    make = partial(_Errors, plan, options, samples, device, metrics or {}, processes, portion)
    try:
        probe: _Errors = yield from backward(make, scratch)
        probe.put_together()
        probe.fill_in()
        for name, squares in probe.squares.items():
            require_number(sum(squares.values()), name)
    except OverflowedError as what:
        raise CalibrationError(
            f"{what}: NaN or Inf on the text ({samples.origin}) that widths are allocated by; the model overflows "
            "there: try other text, or --allocation uniform"
        ) from None
    total = max(probe.samples.count, 1)
    nats = {
        layer.target.name: {
            option: probe.squares[layer.target.name].get(option, 0.0) / (2 * total)
            for option in options[layer.target.name]
        }
        for layer in plan.quantized
    }
    how = f"Fisher information on {probe.samples.count} tokens: {samples.origin}"
    return Sensitivity(conditions(plan), how, nats)


@dataclass(frozen=True)
class _Candidate:
    """A layer's error at one width and group size: R = W - Q [out, in] and the factors of its low rank, largest
    direction first."""

    bits: int
    group_size: int
    rest: torch.Tensor
    B: torch.Tensor
    A: torch.Tensor


class _Errors(Probe):
    """Adds up (g' E x)^2 for every layer and option, as gradients arrive at the layers' outputs."""

    experts = True

    def __init__(
        self,
        plan: Plan,
        options: dict[str, list[Option]],
        samples: Samples,
        device: torch.device,
        metrics: Mapping[str, OutputMetric],
        processes: Processes,
        portion: Portion,
    ) -> None:
        super().__init__(plan, samples, device, processes, portion)
        self.options, self.metrics = options, metrics
        self.squares: dict[str, dict[Option, float]] = {name: {} for name in self.layers}
        self.candidates: dict[str, list[_Candidate]] = {}  # of the part that is at hand, where it is this process's
        self.loads = [0] * processes.count

    def prepare(self, part: Part, run: Run) -> None:
        """Solve layers at all of their options, with the statistics of their inputs where the recipe is calibrated; of
        several processes the one that has the least does it."""
        self.candidates.clear()
        owner = min(range(len(self.loads)), key=self.loads.__getitem__)
        self.loads[owner] += sum(layer.weights for layer in part.layers)
        if owner != self.processes.rank:
            return
        meters: dict[str, Meter] = {}
        if self.plan.recipe.calibrated:
            shared: dict[str, str] = {}  # which layer's meter a layer reads: that of the first with the same input
            inputs: dict[str, torch.Tensor] = {}

            def measured(layer: LayerPlan) -> Any:
                name = layer.target.name

                def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                    if name not in shared:
                        shared[name] = next((first for first, other in inputs.items() if other is args[0]), name)
                    if shared[name] == name:
                        inputs[name] = args[0]
                        require_finite_input(args[0], name, batch.start, self.samples)
                        meter = meters.setdefault(name, Meter([layer], self.device))
                        meter.add(unpadded(args[0], batch.mask))

                return hook

            hooks = [
                module.register_forward_pre_hook(measured(self.layers[name])) for name, module in part.modules.items()
            ]
            for batch in self.batches:
                run(batch)
                inputs.clear()
            for hook in hooks:
                hook.remove()
            meters = {name: meters[first] for name, first in shared.items()}
        for layer in part.layers:
            if layer.target.module.expert is not None:
                continue
            meter = meters.get(layer.target.name)
            statistics = meter.statistics(layer) if meter is not None else None
            if statistics is not None:
                statistics = replace(statistics, output_metric=self.metrics.get(layer.target.name))
            self._solve(layer, part.weight(layer), statistics)
        for stack in part.stacks:
            experts = [layer for layer in part.layers if layer.target.module.parameter == stack]
            self._solve_experts(part, stack, experts, run)

    def _solve_experts(self, part: Part, stack: str, experts: list[LayerPlan], run: Run) -> None:
        """The same for the experts of one parameter, by portions."""
        pool: Meter | None = None
        for some in portions(experts):
            meters = ExpertMeters(some, self.device, pool)
            if self.plan.recipe.calibrated:
                for batch in self.batches:
                    read = partial(self._read, meters, part, batch)
                    with listening(part.root, [part.inner(stack)], read):
                        run(batch)
                pool = meters.pool
            for layer in some:
                self._solve(layer, part.weight(layer), meters.statistics(layer))

    def _read(self, meters: ExpertMeters, part: Part, batch: Batch, inner: str, x: torch.Tensor) -> None:
        require_finite_input(x, part.prefix + inner, batch.start, self.samples)
        meters.add(part.prefix + inner, x)

    def _solve(self, layer: LayerPlan, weight: torch.Tensor, statistics: Statistics | None) -> None:
        """Find what is left of a layer at each width and group size, quickly."""
        name = layer.target.name
        found = []
        for bits, group_size in sorted({option[:2] for option in self.options[name]}):
            rank = max(option.rank for option in self.options[name] if option[:2] == (bits, group_size))
            spec = replace(
                self.plan.layer_spec(layer) if statistics is not None else self.plan.data_free_spec(layer),
                bits=bits,
                group_size=group_size,
                rank=rank,
                iterations=ROUNDS,
            )
            try:
                solution = solve(weight, spec, seed_of(name, self.plan.recipe.seed), statistics)
            except torch.linalg.LinAlgError as error:
                raise not_decomposable(layer.target.tensor, weight) from error
            assert solution.low_rank is not None
            rest = as_loaded(solution.quantized, spec).neg_().add_(weight)
            found.append(_Candidate(bits, group_size, rest, solution.low_rank.B, solution.low_rank.A))
        self.candidates[name] = found

    def add(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        if name not in self.candidates or len(gradient) != len(x):  # rows of both belong together for a linear layer
            return
        squares = self.squares[name]
        for candidate in self.candidates[name]:
            along = ((x @ candidate.rest.T) * gradient).sum(1)
            repaired = (x @ candidate.A.T) * (gradient @ candidate.B)  # [tokens, r]: what each direction gives back
            for option in self.options[name]:
                if option[:2] == (candidate.bits, candidate.group_size):
                    left = along - repaired[:, : option.rank].sum(1)
                    squares[option] = squares.get(option, 0.0) + float(left.square().sum(dtype=torch.float64))

    def put_together(self) -> None:
        """Learn what the other processes have measured."""
        for share in self.processes.gather(self.squares, "sensitivities"):
            self.squares |= {name: squares for name, squares in share.items() if squares}

    def fill_in(self) -> None:
        """Give layers that lie in front of the blocks, where no gradient arrives, what the others lose per weight."""
        measured = [layer for name, layer in self.layers.items() if self.squares[name]]
        weights = sum(layer.weights for layer in measured)
        for layer in self.outside:
            name = layer.target.name
            if measured and not self.squares[name]:
                for k, option in enumerate(self.options[name]):
                    lost = sum(self.squares[o.target.name][self.options[o.target.name][k]] for o in measured)
                    self.squares[name][option] = lost * layer.weights / weights
