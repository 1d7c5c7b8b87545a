"""Texts to train and to measure on: a file or a data set of the Hub, as tokens of the model's own tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qinit.calibration.documents import read_file
from qinit.calibration.facts import Facts
from qinit.calibration.hub_documents import HUB_SOURCE, read_hub, require_datasets
from qinit.calibration.tokens import load_tokenizer
from qinit.checkpoint import Checkpoint
from qinit.errors import CompareError

CHARACTERS = 16  # read from a data set for each token that is wanted: far more than a token has
HELD_OUT, MOST_HELD_OUT = 10, 8192  # for validation: one training token in so many, and no more than so many


@dataclass(frozen=True)
class Text:
    """A named stream of token ids [n], int64; numpy, as it goes to other processes."""

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


def read_source(source: str, wanted: int, text_field: str | None, token: str | None) -> tuple[str, str]:
    """Return the name and the text of a file or a Hub data set `owner/name:config@split`, its documents joined by
    blank lines; of a data set about `wanted` tokens are fetched.

    Raises CompareError, CalibrationError (a file or a data set that cannot be read) and HubError.
    """
    path = Path(source)
    if path.exists():
        return path.name, "\n\n".join(read_file(path, text_field))
    match = HUB_SOURCE.fullmatch(source)
    if match is None or source.startswith((".", "-")) or path.suffix.lower() in (".txt", ".json", ".jsonl"):
        raise CompareError(f"{source}: no such file, and no data set id (those look like 'owner/name:config@split')")
    require_datasets(source)
    return source, "\n\n".join(read_hub(source, text_field, token, characters=CHARACTERS * wanted, documents=1))


def tokenized(checkpoint: Checkpoint, named: list[tuple[str, str]]) -> list[Text]:
    """Encode each (name, text) in one go, without special tokens.

    Raises CalibrationError for a model without tokenizer, CompareError for one that belongs to another model.
    """
    tokenizer = load_tokenizer(checkpoint.directory)
    facts = Facts.read(checkpoint.directory, checkpoint.config)
    found = []
    for name, text in named:
        ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int64)
        if facts.vocabulary is not None and len(ids) and ids.max() >= facts.vocabulary:
            raise CompareError(
                f"{name}: the tokenizer made token id {ids.max()}, but the model has ids up to {facts.vocabulary - 1} "
                f"({facts.config_file}: vocab_size {facts.vocabulary}); the tokenizer is that of another model"
            )
        found.append(Text(name, ids))
    return found


def split(text: Text) -> tuple[Text, Text]:
    """Cut a training text: its last tenth, at most 8192 tokens, is held out for validation."""
    cut = len(text.ids) - min(len(text.ids) // HELD_OUT, MOST_HELD_OUT)
    return Text(text.name, text.ids[:cut]), Text(f"{text.name}, its end", text.ids[cut:])
