"""Texts to train and to measure on, as tokens: what `qinit eval` reads, in a form that goes to other processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qinit.errors import CompareError
from qinit.evaluate import text as evaluated
from qinit.source.checkpoint import Checkpoint
from qinit.source.vocabulary import Facts
from qinit.text.hub_documents import HUB_SOURCE

HELD_OUT, MOST_HELD_OUT = 10, 16384  # for validation: one training token in so many, and no more than so many


@dataclass(frozen=True)
class Text:
    """A named stream of token ids [n], int64."""

    name: str
    ids: np.ndarray

    @property
    def tokens(self) -> torch.Tensor:
        return torch.from_numpy(self.ids)

    @classmethod
    def joined(cls, texts: list[Text]) -> Text:
        """Return several texts as one."""
        return cls(" + ".join(text.name for text in texts), np.concatenate([text.ids for text in texts]))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()[:16]


def read_source(source: str, wanted: int, text_field: str | None, token: str | None) -> evaluated.Text:
    """Read a file or a Hub data set `owner/name:config@split`, of which about `wanted` tokens are fetched.

    Raises CompareError, CalibrationError (a file or a data set that cannot be read) and HubError.
    """
    path = Path(source)
    if path.exists():
        return evaluated.file_text(path, text_field)
    match = HUB_SOURCE.fullmatch(source)
    if match is None or source.startswith((".", "-")) or path.suffix.lower() in (".txt", ".json", ".jsonl"):
        raise CompareError(f"{source}: no such file, and no data set id (those look like 'owner/name:config@split')")
    return evaluated.hub_text(source, text_field, token, wanted)


def tokenized(checkpoint: Checkpoint, texts: list[evaluated.Text]) -> list[Text]:
    """Encode each text in one go, as `qinit eval` does.

    Raises CalibrationError for a model without tokenizer and for a tokenizer that belongs to another model.
    """
    facts = Facts.read(checkpoint.directory, checkpoint.config)
    return [Text(text.name, evaluated.tokenize(text, checkpoint.directory, facts).ids.numpy()) for text in texts]


def split(text: Text) -> tuple[Text, Text]:
    """Cut a training text: its last tenth, at most 16384 tokens, is held out for validation."""
    cut = len(text.ids) - min(len(text.ids) // HELD_OUT, MOST_HELD_OUT)
    return Text(text.name, text.ids[:cut]), Text(f"{text.name}, its end", text.ids[cut:])
