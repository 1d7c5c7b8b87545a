"""What is learned: the next token of a text, or the classes of labelled texts. Both give the Trainer examples, and
measure a model on what was held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qinit.errors import CalibrationError, DatasetError
from qinit.evaluate.figures import evaluating, perplexity
from qinit.snndlft.labelled import Labelled, read_labelled
from qinit.snndlft.metrics import measured, require_metric
from qinit.source.checkpoint import read_json
from qinit.source.vocabulary import Facts
from qinit.text.documents import read_file
from qinit.text.tokens import load_tokenizer, require_known

HELD_OUT = 10  # one in so many, where no validation file is given
INSTEAD = "training on text needs it"
IGNORED = -100  # what transformers' losses pass over


@dataclass(frozen=True)
class Data:
    """Where the examples come from: files, the columns of text, the one with the class (None: language modelling), and
    the longest example in tokens."""

    train: Path
    validation: Path | None
    columns: tuple[str, ...]
    label: str | None
    metric: str
    length: int
    seed: int

    @property
    def files(self) -> dict[str, Path | None]:
        return {"train": self.train, "validation": self.validation}


@dataclass(frozen=True)
class Language:
    """Next tokens of windows [n, length] that do not overlap."""

    train: torch.Tensor
    held_out: torch.Tensor
    tokenizer: Any
    task_type = "CAUSAL_LM"
    metric = "perplexity"
    classes = None

    @property
    def examples(self) -> list[dict[str, Any]]:
        return [{"input_ids": window, "labels": window} for window in self.train]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([each[key] for each in examples]) for key in examples[0]}

    def measure(self, model: Any) -> float:
        return perplexity(model, self.held_out.flatten(), self.held_out.shape[1])


@dataclass(frozen=True)
class Classes:
    """The class of each text."""

    train: Labelled
    held_out: Labelled
    tokenizer: Any
    length: int
    metric: str
    task_type = "SEQ_CLS"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def examples(self) -> list[dict[str, Any]]:
        return [
            {"texts": texts, "label": label} for texts, label in zip(self.train.texts, self.train.labels, strict=True)
        ]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            **self.encode([each["texts"] for each in examples]),
            "labels": torch.tensor([each["label"] for each in examples]),
        }

    def encode(self, texts: Sequence[tuple[str, ...]]) -> dict[str, torch.Tensor]:
        columns = [list(column) for column in zip(*texts, strict=True)]
        found = self.tokenizer(*columns, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
        return dict(found)

    def measure(self, model: Any) -> float:
        found = predictions(model, self, self.held_out.texts)
        return measured(self.metric, np.array(self.held_out.labels), found, len(self.classes))


Task = Language | Classes


@torch.no_grad()
def predictions(model: Any, task: Classes, texts: Sequence[tuple[str, ...]], batch_size: int = 32) -> np.ndarray:
    """Return the class that a model finds for each text."""
    found = []
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            inputs = {
                key: value.to(model.device) for key, value in task.encode(texts[start : start + batch_size]).items()
            }
            found.append(model(**inputs).logits.argmax(-1).cpu())
    return torch.cat(found).numpy()


def read_task(data: Data, base: Path, *, trust_remote_code: bool = False) -> Task:
    """Read the data with the base's own tokenizer. Raises QinitErrors for files that cannot be read, columns that are
    not there, labels that are no classes, an unknown metric, and text that is too short."""
    if data.label is not None:
        require_metric(data.metric)
    tokenizer = load_tokenizer(base, trust_remote_code, INSTEAD)
    config = read_json(base / "config.json", "a model directory has one; is this the right directory?")
    facts = Facts.read(base, config, trust_remote_code)
    length = min(facts.clip(data.length), tokenizer.model_max_length)
    if data.label is None:
        return _language(data, tokenizer, facts, length)
    train = read_labelled(data.train, data.columns, data.label)
    if data.validation is None:
        train, held_out = _split(data, train)
    else:
        held_out = read_labelled(data.validation, data.columns, data.label, train.classes)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if tokenizer.pad_token is None:
        raise CalibrationError(f"{base}: its tokenizer has no token to pad with, and none that ends a text")
    return Classes(train, held_out, tokenizer, length, data.metric)


def to_measure(found: Labelled, directory: Path, length: int, metric: str) -> Classes:
    """Return labelled rows for what was trained on their classes, with the tokenizer that lies in its directory. Raises
    CalibrationError."""
    tokenizer = load_tokenizer(directory, instead="copy the base's there")
    return Classes(found, found, tokenizer, min(length, tokenizer.model_max_length), metric)


def _split(data: Data, found: Labelled) -> tuple[Labelled, Labelled]:
    """Hold out a tenth of the rows, drawn with the seed."""
    order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(data.seed)).tolist()
    count = max(1, len(order) // HELD_OUT)
    parts = []
    for chosen in (sorted(order[count:]), sorted(order[:count])):
        parts.append(Labelled([found.texts[i] for i in chosen], [found.labels[i] for i in chosen], found.classes))
    if len(set(parts[0].labels)) < len(found.classes):
        raise DatasetError(f"{data.train}: too few rows of some class to hold a tenth out; give --validation FILE")
    return parts[0], parts[1]


def _language(data: Data, tokenizer: Any, facts: Facts, length: int) -> Language:
    (column,) = data.columns or (None,)
    train = _windows(data.train, column, tokenizer, facts, length)
    if data.validation is not None:
        return Language(train, _windows(data.validation, column, tokenizer, facts, length), tokenizer)
    count = max(1, len(train) // HELD_OUT)
    if len(train) <= count:
        raise CalibrationError(f"{data.train}: has one window of {length} tokens, so that none can be held out")
    return Language(train[:-count], train[-count:], tokenizer)


def _windows(file: Path, column: str | None, tokenizer: Any, facts: Facts, length: int) -> torch.Tensor:
    text = "\n\n".join(read_file(file, column))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if len(ids) < length:
        raise CalibrationError(f"{file}: has {len(ids)} tokens, fewer than one window of {length}; give more text")
    require_known(int(ids.max()), str(file), facts)
    return ids[: len(ids) // length * length].view(-1, length)
