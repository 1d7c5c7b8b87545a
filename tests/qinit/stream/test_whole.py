import pytest

from qinit.errors import CalibrationError
from tests.helpers import calibrated_plan, random_samples
from tests.models import make_float32
from tests.qinit.calibration.test_whole import seen_by


def test_a_checkpoint_that_does_not_load_is_an_error_that_says_what_to_do(tmp_path):
    source = make_float32(tmp_path / "m", "llama")
    plan = calibrated_plan(source)
    (source / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CalibrationError, match=r"cannot be loaded whole for calibration .* --calibration none"):
        seen_by(plan, random_samples())


def test_a_model_that_does_not_run_is_an_error_that_says_what_to_do(tmp_path):
    samples = random_samples()
    samples.tokens[0, 0] = 10**6  # no such token
    with pytest.raises(CalibrationError, match=r"does not run on token ids \(IndexError: .* --calibration none"):
        seen_by(calibrated_plan(make_float32(tmp_path / "m", "llama")), samples)
