import math
from types import SimpleNamespace

import pytest
import torch

from qinit.errors import QinitError
from qinit.evaluate.figures import perplexity


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
