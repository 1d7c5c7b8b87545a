"""Every start of one layer against PEFT's own initialization of it: equal up to rounding and the signs of vectors."""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qinit.adapters import ADAPTERS
from qinit.grids import GRIDS
from qinit.linalg.low_rank import leading, random_basis
from qinit.recipe import make_recipe
from qinit.solver.methods import METHODS, STARTS, on_grid, plain
from qinit.solver.solve import solve
from qinit.solver.spec import Gradient, LayerSpec
from qinit.solver.statistics import Statistics
from qinit.source.targets import LinearModule
from tests.helpers import gauss

OUT, IN, RANK, ALPHA = 40, 24, 5, 15.0
SCALE = ALPHA / RANK
WEIGHT = gauss(OUT, IN)
X = gauss(300, IN, seed=1) * torch.logspace(0, -2, IN) @ torch.linalg.qr(gauss(IN, IN, seed=2)).Q + 0.1
GRADIENT = gauss(300, OUT, seed=3).T @ X


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)
        self.layer.weight.data = WEIGHT.clone()

    def forward(self, x):
        return self.layer(x)


def by_peft(init, **more):
    """Return A, B and the base's weight after PEFT's own initialization."""
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    toy = Toy()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=init, **more)
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(toy, config, run_model=lambda: toy(X))
    if init == "lora_ga":
        preprocess_loraga(toy, config, lambda: (toy(X) * gauss(300, OUT, seed=3)).sum().backward())
    model = peft.get_peft_model(toy, config)
    if init == "eva":
        inputs = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
        peft.initialize_lora_eva_weights(model, [{"x": X}], **inputs)
    layer = model.base_model.model.layer
    return layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data, layer.base_layer.weight.data


def spec_of(name, method=None, **more):
    return LayerSpec(method or STARTS[name], 16, IN, RANK, 1, scale=SCALE, **more)


def ours(name, weight=WEIGHT, **more):
    """Return A and B as they are stored, the base's weight, and the solution."""
    seen = Statistics(X.T @ X / len(X), X.abs().mean(0), len(X), mean=X.mean(0))
    triplets = leading(GRADIENT, 2 * RANK, random_basis(IN, 4 * RANK, 0, X.device), 5)
    spec = spec_of(name, gradient=Gradient(*triplets), **more)
    found = solve(weight, spec, 0, seen if STARTS[name].needs else None)
    stored = ADAPTERS["lora"].encode(LinearModule("x", OUT, IN, transposed=False), found.low_rank, RANK, SCALE, 0)
    return *stored.values(), spec.grid.dequantize(found.quantized), found


def peft_configs():
    import peft
    from peft.tuners.lora.config import CordaConfig

    return {
        "pissa": {"init": "pissa"},
        "olora": {"init": "olora"},
        "corda": {"init": "corda", "corda_config": CordaConfig(corda_method="ipm")},
        "corda kpm": {"init": "corda", "corda_config": CordaConfig(corda_method="kpm")},
        "eva": {"init": "eva", "eva_config": peft.EvaConfig(rho=1.0)},
        "lora-ga": {"init": "lora_ga", "lora_ga_config": peft.LoraGAConfig()},
    }


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "corda kpm", "eva", "lora-ga"])
def test_a_start_is_pefts(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))  # PEFT's corda wants attrs for that
    row = make_recipe(method=(words := name.split())[0], corda_method=words[1] if len(words) > 1 else None).row
    name, (A, B, base, _), theirs = row.name, ours(row.name, method=row), peft_configs()[name]
    theirs_A, theirs_B, theirs_base = by_peft(**theirs)
    if name == "corda":  # what of L is in A and what in B hangs on units of the text there
        assert float(A.norm()) == pytest.approx(float(B.norm()))
        units = float(theirs_A.norm() / A.norm())
        A, B = A * units, B / units
    same = {"rtol": 1e-3, "atol": 1e-3 * float(theirs_A.abs().max())}
    torch.testing.assert_close(A * (A * theirs_A).sum(1).sign()[:, None], theirs_A, **same)
    signs = (B * theirs_B).sum(0).sign()
    torch.testing.assert_close(B * signs, theirs_B, rtol=1e-3, atol=1e-3 * float(theirs_B.abs().max()))
    assert bool(B.any()) == (name != "eva")
    if name != "lora-ga":  # there each of A's rows has a sign of its own
        torch.testing.assert_close(base, theirs_base, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", STARTS)
def test_the_base_and_the_adapter_make_the_weight(name):
    A, B, base, found = ours(name)
    torch.testing.assert_close(base + SCALE * B @ A, WEIGHT, rtol=1e-4, atol=1e-5) if found.low_rank else None
    assert found.error < 1e-6
    assert torch.equal(base, WEIGHT) == (STARTS[name].start == "none")


def test_the_minor_components_are_what_the_leading_ones_leave():
    *_, base, _ = ours("milora")
    U, S, Vh = torch.linalg.svd(WEIGHT, full_matrices=False)
    kept = IN - RANK
    torch.testing.assert_close(base, (U[:, :kept] * S[:kept]) @ Vh[:kept], rtol=1e-4, atol=1e-4)


def test_power_iterations_come_as_close_as_pefts_with_as_many():
    steep = (U := torch.linalg.svd(WEIGHT, full_matrices=False))[0] * torch.logspace(0, -2, IN) @ U[2]
    *_, exact = ours("pissa", steep)
    *_, found = ours("pissa", steep, niter=4)
    assert exact.quantized_error < found.quantized_error * 1.0001
    torch.testing.assert_close(
        found.low_rank.B @ found.low_rank.A, exact.low_rank.B @ exact.low_rank.A, atol=1e-3, rtol=0
    )


def test_rounding_to_normal_floats_makes_qpissa_of_pissa():
    row, bits = on_grid(STARTS["pissa"], "nf"), 4
    spec = replace(spec_of("pissa"), method=row, bits=bits, group_size=8)
    found, published = solve(WEIGHT, spec), solve(WEIGHT, replace(spec, method=METHODS["qpissa"]))
    assert torch.equal(found.quantized.codes, published.quantized.codes)
    assert found.error == published.error


@pytest.mark.parametrize("grid", ["int", "nf"])
def test_a_grid_rounds_what_the_adapter_leaves(grid):
    spec = replace(spec_of("olora"), method=on_grid(STARTS["olora"], grid), bits=3, group_size=8)
    found = solve(WEIGHT, spec)
    assert found.quantized_error > found.error > 0.01
    rest = WEIGHT - found.low_rank.B @ found.low_rank.A
    again, _ = GRIDS[grid].quantize(rest, rest, bits=3, group_size=8, search=spec.method.search)
    assert torch.equal(found.quantized.codes, again.codes)


def test_a_layer_that_the_text_does_not_reach_starts_plainly():
    found = solve(WEIGHT, replace(spec_of("corda"), method=plain(STARTS["corda"])))
    assert found.low_rank is None
    assert found.error == 0
