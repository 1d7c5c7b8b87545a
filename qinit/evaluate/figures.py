"""The figures of a model on windows of text, from its logits alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qinit.errors import QinitError
from qinit.evaluate.windows import Windows, cut_windows
from qinit.steps import finish

CHUNK_VALUES = 1 << 24  # logits that are turned into probabilities at once: 64 MB each of a few temporaries

Logits = Callable[[slice], torch.Tensor]  # rows of the windows -> [rows, length, vocabulary]


@dataclass(frozen=True)
class Figures:
    """Means over the predicted tokens: `loss` and `reference_loss` are -log p of the true token in nats, `kl` is
    KL(reference || model) of the next token in nats, `agreement` the share of tokens where both find the same one most
    likely. The last three are None without a reference."""

    tokens: int
    loss: float
    reference_loss: float | None = None
    kl: float | None = None
    agreement: float | None = None

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def reference_perplexity(self) -> float | None:
        return None if self.reference_loss is None else _exp(self.reference_loss)


@torch.no_grad()
def measure(
    windows: Windows, batch_size: int, logits: Logits, reference: Logits | None = None
) -> Generator[int, None, Figures]:
    """Yield the number of windows done after each batch of `batch_size`, and return the figures.

    Raises QinitError when a model predicts NaN or Inf, and when the two have vocabularies of different sizes.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # loss, the reference's loss, KL, agreements
    for start in range(0, len(windows), batch_size):
        rows = slice(start, min(start + batch_size, len(windows)))
        found = logits(rows)
        other = None if reference is None else reference(rows)
        if other is not None and other.shape != found.shape:
            raise QinitError(
                f"the reference predicts {other.shape[-1]} tokens, the model {found.shape[-1]}; they cannot be compared"
            )
        sums += _sums(windows.tokens[rows], windows.first[rows], found, other)
        if not math.isfinite(float(sums.sum())):
            raise QinitError(
                f"NaN or Inf in the predictions for windows {rows.start + 1} to {rows.stop} of the text; the weights "
                "are damaged, or overflow in this dtype (float32 has the widest range)"
            )
        yield rows.stop
    loss, reference_loss, kl, agreement = (sums / windows.predicted).tolist()
    if reference is None:
        return Figures(windows.predicted, loss)
    return Figures(windows.predicted, loss, reference_loss, kl, agreement)


def perplexity(model: Any, tokens: torch.Tensor, window: int = 512, batch_size: int = 8) -> float:
    """Return exp of the mean next-token loss over non-overlapping windows of `tokens` [n]; raises as `figures_of`."""
    return figures_of(model, tokens, window, batch_size).perplexity


def figures_of(
    model: Any, tokens: torch.Tensor, window: int = 512, batch_size: int = 8, reference: Any = None
) -> Figures:
    """Measure a loaded model, beside a loaded `reference` if there is one, on non-overlapping windows of `tokens` [n],
    see `cut_windows`.

    Raises QinitError for a text shorter than one window, and as `measure`.
    """
    windows = cut_windows(tokens, window)
    other = None if reference is None else logits_of(reference, windows)
    with evaluating(model):
        return finish(measure(windows, batch_size, logits_of(model, windows), other))


def logits_of(model: Any, windows: Windows) -> Logits:
    """Return what gives a loaded model's logits for rows of the windows."""
    return lambda rows: model(input_ids=windows.tokens[rows].to(model.device)).logits


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into eval mode, and back at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _sums(
    tokens: torch.Tensor, first: torch.Tensor, logits: torch.Tensor, reference: torch.Tensor | None
) -> torch.Tensor:
    """Add up loss, the reference's loss, KL and agreements over the predicted tokens of a batch, float64 [4]."""
    length = tokens.shape[1]
    predicted = (torch.arange(length) >= first[:, None]).flatten().nonzero().flatten()  # by the token before each
    labels = tokens.flatten()[predicted].to(logits.device)
    before = (predicted - 1).to(logits.device)
    flat = logits.flatten(0, 1)
    other = None if reference is None else reference.flatten(0, 1).to(logits.device)
    sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
    size = max(1, CHUNK_VALUES // flat.shape[1])
    for at, label in zip(before.split(size), labels.split(size), strict=True):
        log_p = flat[at].float().log_softmax(-1)
        sums[0] -= log_p.gather(1, label[:, None]).sum(dtype=torch.float64)
        if other is not None:
            log_q = other[at].float().log_softmax(-1)
            sums[1] -= log_q.gather(1, label[:, None]).sum(dtype=torch.float64)
            sums[3] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            sums[2] += log_p.neg_().add_(log_q).mul_(log_q.exp()).sum(dtype=torch.float64)
    return sums.cpu()


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
