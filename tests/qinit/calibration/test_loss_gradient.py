"""The gradients of the weights, block by block, against one pass back of the stock model."""

import pytest
import torch

from qinit.calibration import loss_gradient
from qinit.calibration.loss_gradient import loss_gradients
from qinit.calibration.probe import OverflowedError
from qinit.errors import CalibrationError
from qinit.stream.feeding import inputs_of
from tests.helpers import calibrated_plan, exhausted, padded, random_samples
from tests.models import make_float32
from tests.traces import oriented, stock

CPU = torch.device("cpu")


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_they_are_those_of_the_mean_loss_of_the_next_token(family, mask, tmp_path):
    plan = calibrated_plan(make_float32(tmp_path / family, family), method="lora-ga", rank=16)
    samples = padded(random_samples(5), [12, 3, 7, 12, 9]) if mask else random_samples(5)
    found, _ = exhausted(loss_gradients(plan, samples, CPU))
    model = stock(plan)
    labels = samples.tokens if samples.mask is None else samples.tokens.masked_fill(~samples.mask, -100)
    attention = None if samples.mask is None else samples.mask.long()
    model(**inputs_of(model, samples.tokens, attention), labels=labels).loss.backward()
    assert found.keys() == {layer.target.name for layer in plan.quantized}
    for layer in plan.quantized:
        exact = oriented(model.get_submodule(layer.target.name).weight.grad, layer)
        got = found[layer.target.name]
        assert got.S.shape == (32,)
        torch.testing.assert_close(got.S, torch.linalg.svdvals(exact)[:32], rtol=1e-2, atol=1e-5)
        projected = got.U @ (got.U.T @ exact @ got.Vh.T) @ got.Vh
        torch.testing.assert_close((got.U * got.S) @ got.Vh, projected, rtol=1e-2, atol=1e-5)


def test_an_overflow_names_the_layer_and_the_text(llama, monkeypatch):
    def overflow(*_):
        raise OverflowedError("model.layers.1.mlp.up_proj")
        yield

    monkeypatch.setattr(loss_gradient, "backward", overflow)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.up_proj: NaN or Inf on the text \(a test\)"):
        exhausted(loss_gradients(calibrated_plan(llama), random_samples(2), CPU))
