"""One run against its source, as a stranger would find it: loaded with stock transformers and peft, and nothing else.

Nothing of qinit is asked for a figure but qinit.json and the snippet that a run prints.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qinit.report.card import snippet_of
from qinit.report.report import Report
from tests.families.inputs import answers, inputs_of, loss_of
from tests.stock import ADAPTER, delta, dense_weight, relative

# Packed weights are dequantized in float16, and some models compute parts in it.
TOLERANCE = 2e-3
WRAPPED = re.compile(r"\.(base_layer|original_module)\b")  # what PEFT puts into a name
SLICE = re.compile(r"\[\d+\]$")  # of a 3-D parameter: one expert's matrix
ERRORS = 2e-3  # relative, between an error as reported and as found


@dataclass(frozen=True)
class Loaded:
    """A run as the printed snippet loads it, its twin (the source with Q + s B A in the layers' place), the layers and
    the parameters of experts that PEFT has adapted, and something to feed both."""

    model: Any
    twin: Any
    adapted: dict[str, Any]
    inputs: dict[str, torch.Tensor]


def findings(source: Path, run: Path, reads: str = "text") -> list[str]:
    """Return what is wrong with a run, a line each; none where a trainer starts from Q + s B A.

    `reads` says what the model's forward takes. Errors of the loaders are findings too.
    """
    found: list[str] = []
    try:
        found.extend(_found(source, run, Report.read(run), reads))
    except Exception as error:  # a loader can fail in any way
        found.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return found


def _found(source: Path, run: Path, report: Report, reads: str) -> Iterator[str]:
    rows = {row.name: row for row in report.layers}
    with _loading_info() as lacking:
        original = _as_configured(source)
    with warnings.catch_warnings(record=True) as said, _loading_info() as missing:
        warnings.simplefilter("always")
        model = _as_printed(report, run)
    yield from (f"warning: {str(w.message)[:200]}" for w in said if "adapter keys" in str(w.message))
    base = model.get_base_model()
    if type(base) is not type(original):
        yield f"the printed snippet loads {type(base).__name__}, config.json names {type(original).__name__}"
        return
    for key, names in missing.items():
        if more := sorted(names - lacking.get(key, set())):
            yield f"loading info: {key} {more[:3]}"
    yield from _differing(original, base, {SLICE.sub("", name) for name, row in rows.items() if row.kept is None})
    adapted = _adapted(base)
    reported = {SLICE.sub("", name) for name, row in rows.items() if row.rank}
    if adapted.keys() != reported:
        stray, lost = sorted(adapted.keys() - reported), sorted(reported - adapted.keys())
        yield f"adapted, not in the report: {stray[:3]}; in the report, not adapted: {lost[:3]}"
    yield from _factors(model, run)
    for name, row in rows.items():
        yield from _errors(row, *_matrices(name, original, base, adapted))
    loaded = Loaded(model, _twin(original, adapted), adapted, inputs_of(original, reads))
    yield from _outputs(loaded)
    yield from _training(loaded)


@contextmanager
def _loading_info() -> Iterator[dict[str, set[str]]]:
    """Give what `from_pretrained` has to say about keys, once it has been called within."""
    from transformers import PreTrainedModel

    found: dict[str, set[str]] = {}
    real = PreTrainedModel.__dict__["from_pretrained"]

    def listening(cls: Any, *args: Any, **options: Any) -> Any:
        model, info = real.__func__(cls, *args, **options, output_loading_info=True)
        found.update((key, set(map(str, value))) for key, value in info.items())
        return model

    PreTrainedModel.from_pretrained = classmethod(listening)
    try:
        yield found
    finally:
        PreTrainedModel.from_pretrained = real


def _as_configured(directory: Path) -> Any:
    """Load with the class that config.json names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    return getattr(transformers, config.architectures[0]).from_pretrained(directory, dtype=torch.float32).eval()


def _as_printed(report: Report, run: Path) -> Any:
    names: dict[str, Any] = {}
    exec("\n".join(snippet_of(report, str(run))), names)
    return names["model"].float()


def _differing(original: Any, base: Any, quantized: set[str]) -> Iterator[str]:
    """Tell of parameters that are not quantized and yet not the source's; a packed layer's bias is kept in float16."""
    stored = (*base.named_parameters(remove_duplicate=False), *base.named_buffers())
    parameters = {WRAPPED.sub("", name): value for name, value in stored}
    for name, parameter in original.named_parameters(remove_duplicate=False):
        layer, _, part = name.rpartition(".")
        if name in quantized or (layer in quantized and part == "weight"):
            continue
        found, rounded = parameters.get(name), parameter.half().float() if layer in quantized else parameter
        if found is None or not any(torch.equal(found.float(), value) for value in (parameter, rounded)):
            yield f"{name} is {'gone' if found is None else 'changed'}"


def _factors(model: Any, run: Path) -> Iterator[str]:
    with safe_open(run / ADAPTER / "adapter_model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    trained = ((name, p) for name, p in model.named_parameters() if "lora_" in name or ".modules_to_save." in name)
    loaded = {name.replace(".modules_to_save", "").replace(".default", ""): p for name, p in trained}
    if saved.keys() != loaded.keys():
        yield f"factors in the file and in the model differ: {sorted(saved.keys() ^ loaded.keys())[:3]}"
    yield from (
        f"{name} is not what the file holds"
        for name in saved.keys() & loaded.keys()
        if not torch.equal(saved[name].float(), loaded[name].float())
    )
    yield from (f"{name} is not trained" for name, parameter in loaded.items() if not parameter.requires_grad)


def _adapted(base: Any) -> dict[str, Any]:
    """Return PEFT's wrappers by the name of what each adapts: a module, or a parameter (target_parameters)."""
    found = {}
    for path, module in base.named_modules():
        if hasattr(module, "lora_A"):
            parameter = getattr(module, "parameter_name", None)
            found[WRAPPED.sub("", path) + (f".{parameter}" if parameter else "")] = module
    return found


def _change(module: Any) -> torch.Tensor:
    """s B A in the shape of what is adapted, with PEFT's own scale."""
    if hasattr(module, "parameter_name"):
        return module.get_delta_weight("default").detach().float()
    return delta(module)


def _matrices(name: str, original: Any, base: Any, adapted: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return a layer's weight in the source, in the run's base, and what the adapter adds: matrices, as they lie."""
    whole = SLICE.sub("", name)
    wrapper = adapted.get(whole)
    if whole != name:
        at = int(name[len(whole) + 1 : -1])
        parameter = base.get_parameter(whole) if wrapper is None else wrapper.get_param()
        stacks = original.get_parameter(whole), parameter, None if wrapper is None else _change(wrapper)
        weight, found, change = (None if stack is None else stack.detach()[at].float() for stack in stacks)
    else:
        weight = dense_weight(original.get_submodule(name))
        found = dense_weight(base.get_submodule(name) if wrapper is None else wrapper.get_base_layer())
        change = None if wrapper is None else _change(wrapper)
    return weight, found, torch.zeros_like(weight) if change is None else change


def _errors(row: Any, weight: torch.Tensor, found: torch.Tensor, change: torch.Tensor) -> Iterator[str]:
    rest = weight - found
    if row.kept:
        if rest.any() or change.any():
            yield f"{row.name} was to be kept as it is ({row.kept}), and is changed"
        return
    for what, left, said in (("without", rest, row.error_start), ("with", rest - change, row.error)):
        is_left = float(left.norm() / weight.norm())
        if abs(is_left - said) > ERRORS * max(said, 0.05):
            yield f"{row.name}: error {what} the adapter is {is_left:.4f}, reported {said:.4f}"


def _twin(original: Any, adapted: dict[str, Any]) -> Any:
    """Return the source with Q + s B A as the weights of all adapted layers."""
    from transformers.pytorch_utils import Conv1D

    twin = copy.deepcopy(original)
    for name, module in adapted.items():
        if hasattr(module, "parameter_name"):
            path, _, parameter = name.rpartition(".")
            setattr(twin.get_submodule(path), parameter, nn.Parameter(module.get_param().detach() + _change(module)))
            continue
        weight = dense_weight(module.get_base_layer()) + _change(module)
        linear = twin.get_submodule(name)
        linear.weight = nn.Parameter(weight.T.contiguous() if isinstance(linear, Conv1D) else weight)
    return twin.eval()


@torch.no_grad()
def _outputs(loaded: Loaded) -> Iterator[str]:
    found, expected = (answers(model.eval()(**loaded.inputs)) for model in (loaded.model, loaded.twin))
    if not torch.isfinite(found).all():
        yield "outputs are not finite"
    elif (apart := relative(found, expected)) > TOLERANCE:
        yield f"outputs are {apart:.4f} from those of Q + s B A"


def _training(loaded: Loaded) -> Iterator[str]:
    """A step against the gradient lowers the loss, and reaches every adapted layer that the forward calls."""
    model = loaded.model.eval()  # no dropout: the loss may change by the step alone
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in loaded.adapted.items()
    ]
    loss = loss_of(model(**loaded.inputs))
    loss.backward()
    for hook in hooks:
        hook.remove()
    if idle := sorted(loaded.adapted.keys() - called):
        yield f"adapted and never called: {idle[:3]}"
    trained = [p for p in model.parameters() if p.requires_grad]
    for name in sorted(called):
        module = loaded.adapted[name]
        factors = [*module.lora_A.parameters(), *module.lora_B.parameters()]
        if not any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in factors):
            yield f"no gradient reaches {name}"
    length = sum(float(p.grad.square().sum()) for p in trained if p.grad is not None)
    if not 0 < length < float("inf"):
        yield f"the gradient's size is {length}"
        return
    before = float(loss.detach())
    with torch.no_grad():
        for p in trained:
            if p.grad is not None:
                p -= p.grad * (1e-2 * before / length)
        after = float(loss_of(model(**loaded.inputs)))
    if not after < before:
        yield f"a step does not lower the loss: {before:.6f} to {after:.6f}"
