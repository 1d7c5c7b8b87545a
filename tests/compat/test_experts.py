"""Mixtures of experts with stock transformers and PEFT: each slice is Q, and its adapter is s B A of that expert."""

import copy

import pytest
import torch

from qinit.adapters import ADAPTER_DIRECTORY
from qinit.adapters.reading import SavedAdapter
from qinit.linalg.low_rank import LowRank
from qinit.runner.layer import read_weight
from qinit.solver.residual import relative_errors
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import read_architecture
from qinit.stream.weights import ModelWeights
from tests.models import make_float32
from tests.stock import dense_twin, load, load_base, logits, lora_modules, quantize, relative

pytest.importorskip("peft", minversion="0.19.1")

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4", "granitemoe")
RANDOM = {"calibration": "random", "calibration_samples": 8, "calibration_length": 32}


def wrappers(model):
    """PEFT's wrappers of 3-D parameters, by the parameters' names."""
    found = {n: m for n, m in model.get_base_model().named_modules() if type(m).__name__ == "ParamWrapper"}
    return {f"{n.replace('.base_layer', '')}.{m.parameter_name}": m for n, m in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("calibration", ["none", "random"])
def test_stock_loaders_compute_with_q_plus_the_adapter_of_every_expert(family, calibration, tmp_path):
    source = make_float32(tmp_path / "m", family, num_hidden_layers=1)
    options = {**RANDOM, "calibration": calibration, "rank": 4, "lora_alpha": 12.0, "format": "dense"}
    plan, report = quantize(source, tmp_path / "out", bits=3, check=False, **options)
    base = dict(load_base(tmp_path / "out").named_parameters())
    model = load(tmp_path / "out")
    wrapped, rows = wrappers(model), {row.name: row for row in report.layers}
    experts = [layer for layer in plan.quantized if layer.target.module.expert is not None]
    assert wrapped.keys() == {layer.target.module.parameter for layer in experts}
    assert len(experts) == 8
    twin = load_base(source)
    for layer in experts:
        target, module = layer.target, layer.target.module
        change = wrapped[module.parameter].get_delta_weight("default").detach()[module.expert.index]
        Q = base[module.parameter].detach()[module.expert.index]
        twin.get_parameter(module.parameter).data[module.expert.index] = Q + change
        if module.transposed:
            Q, change = Q.T, change.T
        U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
        assert float(S[4]) < 1e-6 * float(S[0])  # of rank 4
        low_rank = LowRank((U * S).float(), Vh.float())
        row = rows[target.name]
        found = relative_errors(read_weight(layer, torch.device("cpu")), Q.contiguous(), low_rank)
        assert found == pytest.approx((row.error_start, row.error), rel=1e-3)
        assert row.error < row.error_start
    linear = {name: module for name, module in lora_modules(model).items() if name not in wrapped}
    for name in [name for name in linear if type(linear[name]).__name__ != "ParamWrapper"]:
        weight, lora = linear[name].base_layer.weight, linear[name]
        change = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        twin.get_submodule(name).weight.data = (weight + change).detach()
    assert relative(logits(model), logits(twin)) < 1e-4


def test_what_is_read_back_is_what_peft_computes(tmp_path):
    for family in ("gpt_oss", "llama4", "qwen3_moe"):
        source, out = make_float32(tmp_path / family, family, num_hidden_layers=1), tmp_path / f"{family}-out"
        quantize(source, out, rank=4, format="dense", check=False)
        checkpoint = Checkpoint.open(out)
        adapter = SavedAdapter.open(out / ADAPTER_DIRECTORY)
        weights = ModelWeights(checkpoint, read_architecture(checkpoint), adapter=adapter)
        merged = load(out).merge_and_unload()
        for name, parameter in merged.named_parameters():
            if parameter.dim() == 3:
                found = weights.read(name, torch.device("cpu"))
                torch.testing.assert_close(found, parameter.detach(), rtol=1e-4, atol=1e-6)


def test_experts_learn_and_a_saved_adapter_comes_back(tmp_path):
    from peft import PeftModel

    source, out = make_float32(tmp_path / "m", "qwen3_moe", num_hidden_layers=1), tmp_path / "out"
    quantize(source, out, rank=4, format="dense", check=False)
    model = load(out)
    model.train()
    tokens = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(float(loss.detach()))
        for wrapper in wrappers(model).values():
            assert wrapper.lora_A["default"].weight.grad.any()
            assert wrapper.lora_B["default"].weight.grad.any()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(copy.deepcopy(load_base(out)), tmp_path / "trained")
    assert torch.allclose(logits(again), expected, atol=1e-5)


def test_gptq_leaves_experts_as_they_are(tmp_path):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    source, out = make_float32(tmp_path / "m", "mixtral", num_hidden_layers=1), tmp_path / "out"
    plan, report = quantize(source, out, format="gptq", check=False)
    assert {layer.target.name.rsplit(".", 1)[-1] for layer in plan.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any(note.startswith("experts: ") for note in report.notes)
    model = load(out)
    before = dict(load_base(source).named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if parameter.dim() == 3:
            assert torch.equal(parameter, before[name])
    assert relative(logits(model), logits(dense_twin(source, model))) < 1e-4
