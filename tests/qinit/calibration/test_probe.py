"""How much text a probe takes, in which batches, and what it draws."""

from math import inf, nan

import pytest
import torch

from qinit.calibration import probe as module
from qinit.calibration.probe import OverflowedError, Probe, drawn, require_number
from tests.helpers import calibrated_plan, padded, random_samples


class Still(Probe):
    def __init__(self, plan, samples):
        super().__init__(plan, samples, torch.device("cpu"))

    def add(self, name, x, gradient):
        pytest.fail("nothing is taken back")


def test_only_the_beginning_of_a_long_text_is_taken(llama, monkeypatch):
    monkeypatch.setattr(module, "GRADIENT_SAMPLES", 3)
    monkeypatch.setattr(module, "GRADIENT_LENGTH", 8)
    probe = Still(calibrated_plan(llama), padded(random_samples(7), [12, 5, 9, 12, 2, 7, 8]))
    assert probe.samples.tokens.shape == (3, 8)
    assert probe.samples.mask.sum(1).tolist() == [8, 5, 8]


@pytest.mark.parametrize(("limit", "sizes"), [(1024, [7]), (24, [2, 2, 2, 1]), (1, [1] * 7)])
def test_batches_hold_so_many_tokens(llama, monkeypatch, limit, sizes):
    monkeypatch.setattr(module, "GRADIENT_BATCH_TOKENS", limit)
    probe = Still(calibrated_plan(llama), random_samples(7, 12))
    assert [batch.stop - batch.start for batch in probe.batches] == sizes


def test_a_large_vocabulary_makes_batches_small(llama, monkeypatch):
    monkeypatch.setattr(module, "GRADIENT_LOGITS_BYTES", 4 * 256 * 12 * 3)
    assert [batch.stop - batch.start for batch in Still(calibrated_plan(llama), random_samples(7, 12)).batches] == [
        3,
        3,
        1,
    ]


@pytest.mark.parametrize("value", [nan, inf, torch.tensor(nan)])
def test_what_is_no_number_is_an_overflow(value):
    with pytest.raises(OverflowedError, match="the model's output"):
        require_number(value, "the model's output")


def test_a_token_that_cannot_be_is_none():
    require_number(-inf, "")
    require_number(torch.tensor(-3e38), "")


def test_labels_are_drawn_as_often_as_they_are_likely():
    likely = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    labels = drawn(likely.log().expand(20000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(labels.bincount(minlength=6) / 20000, likely, rtol=0, atol=0.015)
    assert not set(labels.unique().tolist()) & {0, 3, 5}
