import math
from types import SimpleNamespace

import pytest
import torch

from qinit.train.finetune import DivergedError, Training, batches, finetune


class Unigram(torch.nn.Module):
    """Predicts every token by one table of logits; `seen` are the batches that it was given."""

    device = torch.device("cpu")

    def __init__(self, size=8):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(size))
        self.frozen = torch.nn.Parameter(torch.ones(size), requires_grad=False)
        self.seen = []

    def forward(self, input_ids, labels, use_cache):
        self.seen.append(input_ids.clone())
        rows = self.logits.expand(labels[:, 1:].numel(), -1)
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(rows, labels[:, 1:].flatten()))


TOKENS = torch.randint(0, 8, (200,), generator=torch.Generator().manual_seed(0))


def trained(seed=0, **training):
    model = Unigram()
    losses = []
    finetune(
        model,
        TOKENS,
        Training(**{"steps": 5, "length": 10, "batch": 4, **training}),
        rate=0.1,
        seed=seed,
        progress=lambda step, loss: losses.append((step, loss)),
    )
    return model, losses


def test_every_window_is_seen_once_before_any_is_seen_again():
    order = list(batches(10, Training(steps=5, batch=4), seed=3))
    flat = [window for batch in order for window in batch]
    assert [len(batch) for batch in order] == [4] * 5
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_the_order_is_the_seeds_alone():
    one, other = (list(batches(50, Training(steps=9, length=length), seed=1)) for length in (16, 128))
    assert one == other
    assert one != list(batches(50, Training(steps=9), seed=2))


def test_it_learns_and_reports_each_step():
    model, losses = trained(steps=30)
    assert [step for step, _ in losses] == list(range(1, 31))
    assert losses[0][1] == pytest.approx(math.log(8), rel=1e-6)
    assert losses[-1][1] < losses[0][1]
    assert torch.equal(model.frozen, torch.ones(8))
    assert not model.training


def test_windows_do_not_overlap_and_lie_in_the_text():
    model, _ = trained()
    windows = {tuple(row) for row in TOKENS.view(20, 10).tolist()}
    seen = [tuple(row) for batch in model.seen for row in batch.tolist()]
    assert len(seen) == 20
    assert set(seen) <= windows


def test_micro_batches_add_up_to_the_same_step():
    whole, losses = trained()
    parts, other_losses = trained(micro_batch=1)
    assert torch.allclose(whole.logits, parts.logits, atol=1e-6)
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in other_losses], rel=1e-6)
    assert len(parts.seen) == 4 * len(whole.seen)


def test_the_rate_warms_up_and_falls_to_nothing():
    training = Training(steps=150)
    shares = [training.rate_at(step) for step in range(151)]
    assert training.warm_up == 10
    assert shares[:9] == pytest.approx([(step + 1) / 10 for step in range(9)], rel=0.01)
    assert max(shares) <= 1
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == pytest.approx(0, abs=1e-12)
    assert Training(steps=3).warm_up == 1


def test_a_loss_that_is_no_number_ends_it():
    model = Unigram()
    model.logits.data[0] = math.nan
    with pytest.raises(DivergedError, match="no finite number at step 1"):
        finetune(model, TOKENS, Training(steps=3, length=10, batch=2), rate=0.1, seed=0)
