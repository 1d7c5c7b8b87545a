from qinit.calibration import activations
from qinit.calibration.activations import batch_size
from tests.helpers import random_samples


def test_batches_are_as_large_as_the_widest_activation_allows(plan, monkeypatch):
    samples = random_samples(count=7, length=12)
    widest = 128 * 12 * 4  # bytes of one sample in front of down_proj
    for room, expected in ((0, 1), (widest, 1), (3 * widest + 5, 3), (100 * widest, 7)):
        monkeypatch.setattr(activations, "BATCH_BYTES", room)
        assert batch_size(plan("llama"), samples) == expected
