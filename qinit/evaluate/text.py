"""The text that a model is measured on: from a file, a data set on the Hub, or the demo model's own held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch

from qinit.errors import QinitError
from qinit.source.demo import DEMO_WINDOW, demo_directory, held_out_text
from qinit.source.vocabulary import Facts
from qinit.text.documents import is_jsonl, read_file
from qinit.text.hub_documents import read_hub, require_datasets
from qinit.text.tokens import load_tokenizer, require_known

CHARACTERS_PER_TOKEN = 16  # more than any tokenizer makes of ordinary text; only bounds what is fetched
LITERATURE_LENGTH = 2048
HUB_SPLIT = "test"
HELD_OUT = "held-out text of the demo model"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Text:
    """A text with its name for reports (a file's without its directories) and how it was put together, in words."""

    name: str
    text: str
    joined: str


@dataclass(frozen=True)
class Tokens:
    """A text's token ids [n] (int64), and which special tokens the tokenizer added, in words."""

    ids: torch.Tensor
    special: str


def file_text(path: Path, text_field: str | None) -> Text:
    """Read a text file or JSONL; raises CalibrationError for what is neither."""
    if not path.exists():
        raise QinitError(f"{path}: no such file")
    if text_field and not is_jsonl(path):
        raise QinitError(f"{path}: has no fields, so no '{text_field}'; --text-field is for JSONL and data sets")
    return _joined(path.name, read_file(path, text_field, blanks=True))


def hub_text(source: str, text_field: str | None, token: str | None, tokens: int | None) -> Text:
    """Read a data set `owner/name:config@split` (the test split if left out), all of it or the start of it that has
    `tokens` tokens. Raises CalibrationError and HubError."""
    require_datasets(source)
    characters = inf if tokens is None else CHARACTERS_PER_TOKEN * tokens
    # Rows without text count: WikiText's perplexity in the literature includes the blank lines that they make.
    documents = read_hub(source, text_field, token, characters=characters, documents=1, blanks=True, split=HUB_SPLIT)
    name = source if "@" in source else f"{source}@{HUB_SPLIT}"
    return _joined(name, documents)


def own_text() -> Text:
    """Return the demo model's held-out text."""
    return Text(HELD_OUT, held_out_text(), "one text")


def is_demo(directory: Path) -> bool:
    """Whether a checkpoint is the demo model, or was made from it: it has that tokenizer."""
    try:
        return (directory / TOKENIZER_FILE).read_bytes() == (demo_directory() / TOKENIZER_FILE).read_bytes()
    except OSError:
        return False


def length_for(directory: Path, facts: Facts, length: int | None) -> int:
    """Return the length of a window: `length`, or what the literature takes, cut to what the model takes.

    Raises QinitError for a `length` beyond that.
    """
    if length is None:
        return DEMO_WINDOW if is_demo(directory) else facts.clip(LITERATURE_LENGTH)
    if facts.clip(length) < length:
        raise QinitError(
            f"length: {length} is more than the {facts.positions} positions of the model ({facts.config_file}); "
            f"give at most that, or leave it out"
        )
    return length


def tokenize(text: Text, directory: Path, facts: Facts, *, trust_remote_code: bool = False) -> Tokens:
    """Tokenize a text at once with a checkpoint's tokenizer, with the special tokens that it puts there by itself.

    Raises CalibrationError without a tokenizer, and for ids that the model does not have.
    """
    tokenizer = load_tokenizer(directory, trust_remote_code, "copy the tokenizer files of its original there")
    found = tokenizer(text.text, return_attention_mask=False, return_special_tokens_mask=True, verbose=False)
    ids = torch.tensor(found.input_ids, dtype=torch.int64)
    if not len(ids):
        raise QinitError(f"{text.name}: the model's tokenizer makes no tokens of this text; give another text")
    require_known(int(ids.max()), text.name, facts)
    return Tokens(ids, _special_words(tokenizer, ids, torch.tensor(found.special_tokens_mask, dtype=torch.bool)))


def require_same_tokens(text: Text, tokens: Tokens, directory: Path, other: Path) -> None:
    """Raise QinitError when the tokenizer in `other` makes other tokens of the text than the one in `directory`; one
    that is not there is taken to be the same."""
    files = [place / TOKENIZER_FILE for place in (directory, other)]
    if not files[1].is_file() or (files[0].is_file() and files[0].read_bytes() == files[1].read_bytes()):
        return
    found = load_tokenizer(other)(text.text, return_attention_mask=False, verbose=False).input_ids
    if found != tokens.ids.tolist():
        at = next((i for i, (a, b) in enumerate(zip(tokens.ids.tolist(), found, strict=False)) if a != b), None)
        where = f"{len(tokens.ids)} against {len(found)} tokens" if at is None else f"the first at token {at}"
        raise QinitError(
            f"{text.name}: the tokenizer in {directory} makes other tokens of it than the reference's in {other} "
            f"({where}); one of them is that of another model"
        )


def _joined(name: str, documents: list[str]) -> Text:
    if len(documents) == 1:
        return Text(name, documents[0], "one text")
    return Text(name, "\n\n".join(documents), f"{len(documents)} documents joined with blank lines")


def _special_words(tokenizer: Any, ids: torch.Tensor, added: torch.Tensor) -> str:
    if not added.any():
        return "no special tokens"
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(ids[added].tolist())))
    front = bool(added[0]) and int(added.sum()) == 1
    return f"{names} in front of the whole" if front else f"{names} around the whole"
