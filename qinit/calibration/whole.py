"""Statistics from the whole model in memory: for models that are no single row of blocks, and for gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from qinit.calibration.meter import Meter
from qinit.calibration.samples import Samples
from qinit.calibration.walk import Measuring, Seen, batch_size, oriented, require_finite_input, unpadded
from qinit.errors import CalibrationError
from qinit.solver.statistics import Statistics
from qinit.source.skeleton import loader

if TYPE_CHECKING:
    from qinit.plan import Plan


def whole_model(plan: Plan, samples: Samples, device: torch.device) -> Iterator[Measuring | Seen]:
    """Yield what a Walk does in mode `parallel`, from one pass of the whole model (float32) and all H matrices at once.

    For a method whose metric is `fisher`, a backward pass per sample gives the mean squared gradient of the
    next-token loss for every weight (LQ-LoRA, arXiv:2311.12023, section 3.3). Raises CalibrationError.
    """
    model = load_whole(plan).to(device)
    names = tuple(layer.target.name for layer in plan.quantized)
    yield Measuring(0, 1, names)
    meters = {layer.target.name: Meter([layer], device, drift=False) for layer in plan.quantized}
    mask: torch.Tensor | None = None
    first = 0

    def measure(name: str) -> Any:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach()
            require_finite_input(x, name, first, samples)
            meters[name].add(unpadded(x, mask), {})

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(measure(name)) for name in names]
    size = batch_size(plan, samples)
    with torch.no_grad():
        for first in range(0, len(samples.tokens), size):
            part = slice(first, first + size)
            mask = None if samples.mask is None else samples.mask[part].to(device)
            read_tokens(model, samples.tokens[part].to(device), mask, plan)
    for hook in hooks:
        hook.remove()
    fisher = _fisher(model, plan, samples, device) if plan.recipe.row.metric == "fisher" else {}
    for layer in plan.quantized:
        weight = model.get_submodule(layer.target.name).weight.data
        statistics = meters.pop(layer.target.name).statistics(layer)
        if statistics is not None and layer.target.name in fisher:
            statistics = Statistics(
                statistics.hessian, statistics.magnitude, statistics.tokens, fisher=fisher.pop(layer.target.name)
            )
        yield Seen(layer, oriented(weight, layer), statistics)


def read_tokens(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None, plan: Plan) -> Any:
    """Run the model on tokens [batch, length] and return its outputs. Raises CalibrationError if it cannot."""
    inputs = {"input_ids": tokens, "attention_mask": None if mask is None else mask.long()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    try:
        return model(**inputs)
    except CalibrationError:
        raise
    except Exception as error:  # a model can ask for anything beside tokens
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"{plan.checkpoint.directory}: the model does not run on token ids ({type(error).__name__}: {reason}); "
            "use --calibration none"
        ) from error


def _fisher(model: Any, plan: Plan, samples: Samples, device: torch.device) -> dict[str, torch.Tensor]:
    modules = {layer.target.name: model.get_submodule(layer.target.name) for layer in plan.quantized}
    model.requires_grad_(False)
    squares = {}
    for name, module in modules.items():
        module.weight.requires_grad_(True)
        squares[name] = torch.zeros_like(module.weight)
    for index, row in enumerate(samples.tokens):
        tokens = row if samples.mask is None else row[samples.mask[index]]
        if len(tokens) < 2:
            continue
        tokens = tokens[None].to(device)
        with torch.enable_grad():
            model(input_ids=tokens, labels=tokens).loss.backward()
        for name, module in modules.items():
            if module.weight.grad is not None:
                squares[name].add_(module.weight.grad.square(), alpha=1 / len(samples.tokens))
                module.weight.grad = None
    by_name = {layer.target.name: layer for layer in plan.quantized}
    return {name: oriented(square, by_name[name]) for name, square in squares.items()}


def load_whole(plan: Plan) -> Any:
    """Load the source model in float32, to be used and not changed. Raises CalibrationError."""
    directory, trusted = plan.checkpoint.directory, plan.recipe.trust_remote_code
    try:
        model = loader(plan.checkpoint.config, trusted).from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trusted,
        )
    except Exception as error:  # a checkpoint can break its class in any way
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"{directory}: the model cannot be loaded whole for calibration ({type(error).__name__}: {reason}); "
            "use --calibration none"
        ) from None
    return model.eval()
