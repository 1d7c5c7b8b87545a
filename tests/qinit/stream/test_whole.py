import pytest
import torch

from qinit.errors import CalibrationError
from qinit.stream.whole import load_whole, read_tokens
from tests.helpers import calibrated_plan, padded, random_samples
from tests.models import make_checkpoint, make_float32


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_it_is_the_class_of_the_checkpoint_in_float32_and_reads_tokens(family, tmp_path):
    plan = calibrated_plan(make_checkpoint(tmp_path / family, family))
    model = load_whole(plan)
    assert type(model).__name__ == plan.architecture.class_name
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    samples = padded(random_samples(3), [12, 5, 9])
    with torch.no_grad():
        logits = read_tokens(model, samples.tokens, samples.mask, plan).logits
        alone = read_tokens(model, samples.tokens[1:2, :5], None, plan).logits
    assert logits.shape == (3, 12, 256)
    torch.testing.assert_close(logits[1, :5], alone[0], rtol=1e-4, atol=1e-5)  # padding is not looked at


def test_a_checkpoint_that_does_not_load_is_an_error_that_says_what_to_do(tmp_path):
    source = make_float32(tmp_path / "m", "llama")
    plan = calibrated_plan(source)
    (source / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CalibrationError, match=r"cannot be loaded whole for calibration .* --calibration none"):
        load_whole(plan)


def test_a_model_that_does_not_run_is_an_error_that_says_what_to_do(llama):
    plan, samples = calibrated_plan(llama), random_samples()
    samples.tokens[0, 0] = 10**6  # no such token
    with pytest.raises(CalibrationError, match=r"does not run on token ids \(IndexError: .* --calibration none"):
        read_tokens(load_whole(plan), samples.tokens, None, plan)


def test_an_error_of_qinit_s_own_within_the_pass_is_not_taken_for_one_of_the_model(llama):
    plan = calibrated_plan(llama)
    model = load_whole(plan)

    def overflow(*_):
        raise CalibrationError("NaN in sample 3")

    model.lm_head.register_forward_pre_hook(overflow)
    with pytest.raises(CalibrationError, match=r"^NaN in sample 3$"):
        read_tokens(model, random_samples().tokens, None, plan)
