"""A text's tokens, cut into the windows that a model reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinit.errors import QinitError


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, length] (int64); of window i the tokens from position `first[i]` on are predicted.

    `stride` is None where windows do not overlap.
    """

    tokens: torch.Tensor
    first: torch.Tensor
    stride: int | None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return int((self.length - self.first).sum())


def cut_windows(tokens: torch.Tensor, length: int, stride: int | None = None, limit: int | None = None) -> Windows:
    """Cut tokens [n] into windows of `length`, at most `limit` of them.

    Without a stride they do not overlap, the first token of each is given, not predicted, and what fills no window at
    the end is left out, as is usual in the quantization literature (GPTQ, arXiv:2210.17323, section 4). With one they
    start `stride` tokens apart, and the last one ends with the text: every token but the first is predicted once,
    beyond the first window with at least `length - stride` tokens before it.

    Raises QinitError for a text shorter than one window, and for sizes out of range.
    """
    if length < 2:
        raise QinitError(f"length: expected 2 tokens or more, found {length}")
    if stride is not None and not 1 <= stride < length:
        raise QinitError(f"stride: expected 1 to {length - 1}, less than the length of a window, found {stride}")
    if limit is not None and limit < 1:
        raise QinitError(f"windows: expected 1 or more, found {limit}")
    if len(tokens) < length:
        raise QinitError(
            f"the text has {len(tokens)} tokens, fewer than one window of {length}; use more text or a shorter length"
        )
    if stride is None:
        count = len(tokens) // length
        cut = tokens[: count * length].view(count, length)[:limit]
        return Windows(cut, torch.ones(len(cut), dtype=torch.int64), None)
    starts = torch.arange(0, len(tokens) - length + 1, stride)
    if starts[-1] + length < len(tokens):
        starts = torch.cat([starts, torch.tensor([len(tokens) - length])])
    ends = starts + length
    first = torch.cat([torch.ones(1, dtype=torch.int64), ends[:-1] - starts[1:]])
    return Windows(tokens.unfold(0, length, 1)[starts[:limit]], first[:limit], stride)
