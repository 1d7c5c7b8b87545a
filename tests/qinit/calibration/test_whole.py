import pytest
import torch
from safetensors.torch import load_file, save_file

from qinit.calibration import whole
from qinit.calibration.walk import Seen
from qinit.calibration.whole import WholeModel
from qinit.errors import CalibrationError
from qinit.events import Measuring
from tests.helpers import calibrated_plan, padded, random_samples
from tests.models import make_float32
from tests.traces import Trace, assert_close, oriented, stock

CPU = torch.device("cpu")
LENGTHS = [12, 5, 9, 1, 2, 7, 8]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(whole, "batch_size", lambda plan, samples, device: 3)


def seen_by(plan, samples):
    measuring, *events = WholeModel(plan, samples, CPU).visit()
    assert measuring == Measuring(0, 1, tuple(layer.target.name for layer in plan.quantized))
    assert all(isinstance(event, Seen) and event.repair is None for event in events)
    return {event.layer.target.name: event for event in events}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5"])
def test_every_layer_sees_what_it_sees_in_the_stock_model(family, mask, tmp_path, small_batches):
    plan = calibrated_plan(make_float32(tmp_path / "m", family))
    samples = padded(random_samples(), LENGTHS) if mask else random_samples()
    seen = seen_by(plan, samples)
    assert list(seen) == [layer.target.name for layer in plan.quantized]
    model = stock(plan)
    trace = Trace(model, list(seen), samples)
    for name, event in seen.items():
        assert event.statistics.tokens == samples.count
        assert event.statistics.drift is None
        assert event.statistics.fisher is None
        assert_close(event.statistics.hessian, trace.hessian(name))
        assert_close(event.statistics.magnitude, trace.inputs[name].abs().mean(0))
        assert torch.equal(event.weight, oriented(model.get_submodule(name).weight, event.layer))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fisher_is_the_mean_squared_gradient_of_the_next_token_loss(family, mask, tmp_path, small_batches):
    plan = calibrated_plan(make_float32(tmp_path / "m", family), method="lq-lora", bits=2)
    samples = padded(random_samples(), LENGTHS) if mask else random_samples()
    seen = seen_by(plan, samples)
    model = stock(plan)
    expected = {name: torch.zeros_like(model.get_submodule(name).weight) for name in seen}
    for index, row in enumerate(samples.tokens):
        tokens = row if samples.mask is None else row[: LENGTHS[index]]
        if len(tokens) < 2:
            continue  # nothing to predict
        model.zero_grad()
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[1:]).backward()
        for name, total in expected.items():
            total += model.get_submodule(name).weight.grad ** 2 / len(samples.tokens)
    for name, event in seen.items():
        fisher = event.statistics.fisher
        assert fisher.shape == event.weight.shape
        assert not fisher.requires_grad
        assert float(fisher.max()) > 0
        assert_close(fisher, oriented(expected[name], event.layer), 1e-3)


def test_an_activation_that_overflows_names_the_layer_and_the_sample(tmp_path, small_batches):
    source = make_float32(tmp_path / "m", "gpt2")
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.wte.weight"][251] = 3e38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    samples = random_samples()
    samples.tokens[4, -1] = 251
    with pytest.raises(CalibrationError, match=r"h\.0\.attn\.c_attn: .* in sample 4 of .*\(a test\)"):
        seen_by(calibrated_plan(source), samples)


def test_the_gradient_mode_is_the_caller_s(tmp_path):
    for _ in WholeModel(calibrated_plan(make_float32(tmp_path / "m", "llama")), random_samples(), CPU).visit():
        assert torch.is_grad_enabled()
