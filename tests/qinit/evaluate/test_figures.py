import math
from types import SimpleNamespace

import pytest
import torch

from qinit.errors import QinitError
from qinit.evaluate.figures import measure, perplexity
from qinit.evaluate.windows import cut_windows
from tests.helpers import exhausted


class Guess(torch.nn.Module):
    """Gives the true next token a probability that depends on the token."""

    device = torch.device("cpu")

    def __init__(self, table):
        super().__init__()
        self.table = table  # [vocabulary, vocabulary] logits
        self.seen = []

    def forward(self, input_ids):
        self.seen.append((input_ids.shape, self.training))
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    assert perplexity(Guess(torch.zeros(32, 32)), torch.randint(0, 32, (100,)), window=10) == pytest.approx(32)


def test_it_is_the_exponential_of_the_mean_loss_over_whole_windows():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(8, 8, generator=generator)
    tokens = torch.randint(0, 8, (53,), generator=generator)
    losses = []
    for start in range(0, 50, 10):  # the last 3 tokens fill no window
        for i in range(start, start + 9):
            losses.append(-torch.log_softmax(table[tokens[i]], 0)[tokens[i + 1]].item())
    assert perplexity(Guess(table), tokens, window=10) == pytest.approx(math.exp(sum(losses) / 45), rel=1e-5)


def test_the_batch_size_does_not_change_the_result():
    generator = torch.Generator().manual_seed(0)
    model = Guess(torch.randn(8, 8, generator=generator))
    tokens = torch.randint(0, 8, (70,), generator=generator)
    results = [perplexity(model, tokens, window=10, batch_size=size) for size in (1, 3, 100)]
    assert results == pytest.approx([results[0]] * 3)


def test_the_model_is_evaluated_in_eval_mode_and_put_back():
    model = Guess(torch.zeros(8, 8)).train()
    perplexity(model, torch.zeros(20, dtype=torch.long), window=10)
    assert model.seen == [((2, 10), False)]
    assert model.training


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(QinitError, match="9 tokens, fewer than one window of 10"):
        perplexity(Guess(torch.zeros(8, 8)), torch.zeros(9, dtype=torch.long), window=10)


def figures_of(table, windows, batch_size, reference=None):
    """Run `measure` to its end; returns the figures and what it yielded."""
    steps = measure(
        windows,
        batch_size,
        lambda rows: table[windows.tokens[rows]],
        None if reference is None else lambda rows: reference[windows.tokens[rows]],
    )
    return exhausted(steps)


@pytest.fixture
def tables():
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(8, 8, generator=generator) for _ in range(2))


@pytest.fixture
def text():
    return torch.randint(0, 8, (57,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stride", [None, 3])
def test_kl_and_agreement_are_over_the_tokens_that_are_predicted(tables, text, stride):
    table, reference = tables
    windows = cut_windows(text, 10, stride)
    before = [
        int(row[at - 1])
        for row, first in zip(windows.tokens, windows.first.tolist(), strict=True)
        for at in range(first, 10)
    ]
    p, q = (each.double().softmax(1)[before] for each in (table, reference))
    found, _ = figures_of(table, windows, 4, reference)
    assert found.tokens == len(before)
    assert found.kl == pytest.approx(float((q * (q / p).log()).sum(1).mean()), rel=1e-5)
    assert found.agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert 0 < found.agreement < 1
    alone, _ = figures_of(reference, windows, 4)
    assert found.reference_loss == pytest.approx(alone.loss, rel=1e-9)
    assert found.reference_perplexity == pytest.approx(alone.perplexity)
    assert (alone.kl, alone.agreement, alone.reference_perplexity) == (None, None, None)


def test_a_model_is_no_distance_from_itself(tables, text):
    found, _ = figures_of(tables[0], cut_windows(text, 10), 2, tables[0])
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert (found.agreement, found.loss) == (1.0, found.reference_loss)


def test_with_a_stride_all_tokens_but_the_first_count(tables, text):
    table = tables[0]  # what it predicts depends on one token, so that the context makes no difference
    losses = -table.log_softmax(1)[text[:-1], text[1:]]
    found, _ = figures_of(table, cut_windows(text, 10, 4), 3)
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_and_chunks_change_nothing_but_the_steps(tables, text, batch_size, monkeypatch):
    windows = cut_windows(text, 10, 4)
    whole, _ = figures_of(*tables[:1], windows, len(windows), tables[1])
    monkeypatch.setattr("qinit.evaluate.figures.CHUNK_VALUES", 24)  # three tokens at once
    found, done = figures_of(*tables[:1], windows, batch_size, tables[1])
    for name in ("loss", "reference_loss", "kl", "agreement"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-6)
    assert done == [min(at + batch_size, len(windows)) for at in range(0, len(windows), batch_size)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_no_numbers_are_an_error(tables, text, value):
    table = tables[0].clone()
    table[int(text[33])] = value
    with pytest.raises(QinitError, match=r"NaN or Inf in the predictions for windows \d to \d of the text"):
        figures_of(table, cut_windows(text, 10), 2)


def test_other_vocabularies_cannot_be_compared(tables, text):
    with pytest.raises(QinitError, match="the reference predicts 9 tokens, the model 8"):
        figures_of(tables[0], cut_windows(text, 10), 2, torch.zeros(8, 9))
