"""What a user does with the result: run qinit, load with stock transformers and PEFT, look inside."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qinit.events import Finished
from qinit.grids import Quantized
from qinit.plan.plan import Plan
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.report.report import Report
from qinit.runner.run import run
from qinit.solver.residual import as_loaded
from qinit.solver.solve import solve
from qinit.solver.spec import seed_of

ADAPTER = "eqft_init"


def quantize(source: Path, out: Path, **options: Any) -> tuple[Plan, Report]:
    """Run qinit on a checkpoint; small ranks and groups fit the tiny models; no calibration and no check by default."""
    options = {"calibration": "none", "rank": 8, "group_size": 32, "device": "cpu", "check": False, **options}
    plan = make_plan(make_recipe(model=str(source), **options), source, source.name)
    *_, last = run(plan, out)
    assert isinstance(last, Finished)
    return plan, last.report


def load_base(directory: Path, auto_class: str = "AutoModelForCausalLM", dtype: torch.dtype = torch.float32) -> Any:
    """Load with stock transformers; every tensor must find its place."""
    import transformers

    loader = getattr(transformers, auto_class)
    model, info = loader.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected and mismatched keys
    return model


def load_adapter(base: Any, directory: Path) -> Any:
    """Put the adapter on with stock PEFT; every tensor of its file must find its place."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        model = PeftModel.from_pretrained(base, directory, subfolder=ADAPTER, is_trainable=True)
    with safe_open(directory / ADAPTER / "adapter_model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert {name.replace(".default", "") for name in loaded} == set(saved)
    for name, parameter in loaded.items():
        assert parameter.requires_grad
        assert torch.equal(parameter, saved[name.replace(".default", "")])
    return model


def load(directory: Path, **options: Any) -> Any:
    return load_adapter(load_base(directory, **options), directory)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight [out, in] that a loaded module computes with, in float32."""
    from transformers.pytorch_utils import Conv1D

    if hasattr(module, "qweight"):
        return module.dequantize_weight().detach().T.float()
    weight = module.weight.detach().float()
    return weight.T if isinstance(module, Conv1D) else weight


def lora_modules(model: Any) -> dict[str, Any]:
    """PEFT's wrapped modules by their names in the base model."""
    found = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert found
    return found


def delta(module: Any) -> torch.Tensor:
    """s B A [out, in] with PEFT's own scale."""
    A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
    return module.scaling["default"] * (B.detach().double() @ A.detach().double()).float()


def source_weight(plan: Plan, name: str) -> torch.Tensor:
    target = next(layer.target for layer in plan.layers if layer.target.name == name)
    raw = target.tensor.read().float()
    return raw.T.contiguous() if target.module.transposed else raw


def solved(plan: Plan) -> dict[str, tuple[Quantized, torch.Tensor, torch.Tensor]]:
    """Solve every layer once more: its codes, Q as the solver sees it, and L = B A."""
    result = {}
    for layer in plan.quantized:
        name, spec = layer.target.name, plan.layer_spec(layer)
        solution = solve(source_weight(plan, name), spec, seed_of(name, plan.recipe.seed))
        low_rank = solution.low_rank
        product = low_rank.B @ low_rank.A
        result[name] = (solution.quantized, as_loaded(solution.quantized, spec), product)
    return result


def dense_twin(source: Path, model: Any, auto_class: str = "AutoModelForCausalLM", with_adapter: bool = True) -> Any:
    """The source model with its weights replaced by the loaded Q (+ s B A), as ordinary dense weights."""
    import transformers
    from transformers.pytorch_utils import Conv1D

    twin = copy.deepcopy(getattr(transformers, auto_class).from_pretrained(source, dtype=torch.float32))
    for name, wrapped in lora_modules(model).items():
        weight = dense_weight(wrapped.base_layer) + (delta(wrapped) if with_adapter else 0)
        module = twin.get_submodule(name)
        module.weight.data = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    return twin.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    output = model.eval()(input_ids=tokens)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
